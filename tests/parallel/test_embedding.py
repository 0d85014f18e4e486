"""The table's gradient over any number of ranks is the sum of its tokens', and nothing of the table's size is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm3d.parallel.boxes import Box
from llm3d.parallel.layers import VocabParallelEmbedding
from llm3d.parallel.mesh import Mesh
from tests import pool
from tests.kernels.exactness import assert_close, randn

VOCABULARY, HIDDEN, TOKENS = 101, 8, 36


class Operations(TorchDispatchMode):
    """The names of the operations that run, and the elements of the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.numel())
        return result


def microbatch(number: int) -> tuple[Tensor, Tensor]:
    """Tokens, of which some are frequent and some are there once, and the gradients of their embeddings."""
    tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(number))
    tokens[::3] = 7
    return tokens, randn(TOKENS, HIDDEN, seed=number)


def embedding_on_rank(
    table: Tensor, sequence: bool, gradients: torch.dtype
) -> tuple[Tensor, Tensor, set[str], int]:
    """The outputs, this rank's part of the table's gradient after two microbatches, and what ran."""
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    layer = VocabParallelEmbedding(Box.whole("table", tuple(table.shape)), group, sequence)
    part = slice(layer.vocabulary.start, layer.vocabulary.stop)
    weight = type(layer.weight)(table[part].clone(), layer.weight.pieces)
    layer.weight, outputs = weight, []
    weight.main_grad = torch.full_like(weight, torch.nan, dtype=gradients)
    weight.main_grad_is_stale = True
    share = slice(None)
    if sequence:
        rows = TOKENS // group.size()
        share = slice(group.rank() * rows, (group.rank() + 1) * rows)
    with Operations() as operations:
        for number in (1, 2):
            tokens, gradient = microbatch(number)
            out = layer(tokens)
            out.backward(gradient[share].to(table.dtype))
            outputs.append(out.detach())
    return torch.cat(outputs), weight.main_grad, operations.names, operations.largest


def expected_gradient() -> Tensor:
    total = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float64)
    for number in (1, 2):
        total.index_add_(0, *(x if i == 0 else x.double() for i, x in enumerate(microbatch(number))))
    return total


@pytest.mark.parametrize(("num_ranks", "sequence"), [(1, False), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_the_sum_of_the_tokens(
    num_ranks: int, sequence: bool, gradients: torch.dtype
) -> None:
    table = randn(VOCABULARY, HIDDEN, seed=9).float()
    parts = pool.run(embedding_on_rank, num_ranks, table, sequence, gradients)
    found = torch.cat([part[1] for part in parts]).double()
    expected = expected_gradient()
    if gradients == torch.float32:
        assert_close(found, expected)
    else:  # rounded once a microbatch and once a sum, however often a token is there
        assert float((found - expected).abs().max()) <= 2**-7 * float(expected.abs().max())
    outputs = torch.cat([part[0].chunk(2)[0] for part in parts]) if sequence else parts[0][0].chunk(2)[0]
    assert torch.equal(outputs, table[microbatch(1)[0]])


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_tables_size_is_made_and_a_whole_table_is_not_searched(gradients: torch.dtype) -> None:
    table = randn(VOCABULARY, HIDDEN, seed=9).bfloat16()
    ((_, _, names, largest),) = pool.run(embedding_on_rank, 1, table, False, gradients)
    assert largest <= TOKENS * HIDDEN < table.numel()
    assert not names & {"lt", "ge", "bitwise_or", "masked_fill", "masked_fill_"}
