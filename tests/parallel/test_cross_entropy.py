"""Cross-entropy over a vocabulary spread over ranks is that of PyTorch over the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm3d.kernels.backend import using
from llm3d.models.heads import LanguageModelHead
from llm3d.parallel import cross_entropy as module
from llm3d.parallel.boxes import Box, Piece, ShardedParameter
from llm3d.parallel.cross_entropy import (
    TokenTerms,
    cross_entropy_sum,
    entropy_of_logits,
    token_terms,
    token_terms_of_hidden,
)
from llm3d.parallel.layers import vocabulary_range
from llm3d.parallel.mesh import Mesh
from tests import pool
from tests.kernels.backends import BACKENDS, needs_native
from tests.kernels.exactness import assert_as_exact_as, assert_close, error, randn

SCALE = 0.125  # what the loss's gradient is, as one over the number of targets would be


@dataclass(frozen=True)
class Loss:
    """What is summed over the tokens."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    of_log_probabilities: bool = False

    def __call__(self, terms: TokenTerms, targets: Tensor, vocab_size: int) -> Tensor:
        if self.of_log_probabilities:  # as a policy's loss has it: a weight a token
            return (terms.log_probabilities * torch.linspace(-1, 2, len(targets))).sum()
        return cross_entropy_sum(terms, targets, vocab_size, self.z_loss, self.label_smoothing)

    def by_torch(self, logits: Tensor, targets: Tensor) -> Tensor:
        counted = targets.where(targets >= 0, 0)[:, None]
        log_p = logits.log_softmax(-1)
        taken = log_p.gather(1, counted)[:, 0]
        if self.of_log_probabilities:
            return (taken * torch.linspace(-1, 2, len(targets)) * (targets >= 0)).sum()
        loss = -(1 - self.label_smoothing) * taken + self.z_loss * logits.logsumexp(-1).square()
        if self.label_smoothing:
            loss = loss - self.label_smoothing * log_p.mean(-1)
        return loss[targets >= 0].sum()


def on_rank(logits: Tensor, targets: Tensor, loss: Loss, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss with and without a gradient wanted, and the gradient of this rank's part."""
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    part = vocabulary_range(logits.shape[1], group)
    mine = logits[:, part.start : part.stop].clone()
    with using(backend):
        alone = loss(token_terms(mine.clone(), targets, part.start, group), targets, logits.shape[1])
        leaf = mine.requires_grad_()
        total = loss(token_terms(leaf * 1, targets, part.start, group), targets, logits.shape[1])
        total.backward(torch.tensor(SCALE))
    assert leaf.grad is not None
    return total.detach(), alone, leaf.grad


def ours(
    logits: Tensor, targets: Tensor, num_ranks: int, loss: Loss = Loss(), backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Loss and gradient, whole; every rank's loss is the same."""
    parts = pool.run(on_rank, num_ranks, logits, targets, loss, backend)
    for total, alone, _ in parts:
        assert torch.allclose(total, parts[0][0], 0, 0, equal_nan=True)
        assert torch.allclose(alone, total, 0, 0, equal_nan=True)
        assert total.dtype == torch.float32 and total.shape == ()
    return parts[0][0], torch.cat([gradient for _, _, gradient in parts], dim=1)


def by_torch(logits: Tensor, targets: Tensor, loss: Loss = Loss()) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    total = loss.by_torch(leaf, targets)
    return total.detach(), torch.autograd.grad(total * SCALE, leaf)[0]


def some_targets(tokens: int, vocabulary: int) -> Tensor:
    """All over the vocabulary, the first and the last id among them; some ignored."""
    targets = torch.arange(tokens) * 31 % vocabulary
    targets[-1] = vocabulary - 1
    targets[1::4] = -100
    return targets


# On 4 ranks, 101 leaves the last 23 ids of 26, 5 leaves it none, and 2 leaves two ranks none.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [8003, 101, 5, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_loss_and_gradient_do_not_depend_on_the_ranks(num_ranks: int, vocabulary: int, backend: str) -> None:
    for tokens in (1, 37):
        exact, targets = randn(tokens, vocabulary, scale=3.0), some_targets(tokens, vocabulary)
        loss, gradient = ours(exact.float(), targets, num_ranks, backend=backend)
        expected_loss, expected_gradient = by_torch(exact, targets)
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
        assert_close(gradient, expected_gradient)


LOSSES = [Loss(z_loss=1e-2), Loss(label_smoothing=0.1), Loss(0.1, 0.3), Loss(of_log_probabilities=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_other_losses_are_made_of_the_same_terms(num_ranks: int, loss: Loss, backend: str) -> None:
    exact, targets = randn(37, 101, scale=3.0), some_targets(37, 101)
    total, gradient = ours(exact.float(), targets, num_ranks, loss, backend)
    expected, expected_gradient = by_torch(exact, targets, loss)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_bf16_is_as_exact_as_torch(num_ranks: int, backend: str) -> None:
    exact, targets = randn(37, 101, scale=3.0), some_targets(37, 101)
    loss, gradient = ours(exact.bfloat16(), targets, num_ranks, backend=backend)
    expected_loss, expected_gradient = by_torch(exact, targets)
    their_loss, their_gradient = by_torch(exact.bfloat16(), targets)
    assert_as_exact_as(their_gradient, gradient, expected_gradient)
    assert error(loss, expected_loss) <= 2 * error(their_loss, expected_loss)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_where_all_targets_are_ignored_there_is_no_loss(num_ranks: int) -> None:
    for value in (1.0, torch.nan, -torch.inf):
        logits, targets = randn(6, 11).float().abs() * value, torch.full((6,), -100)
        for kind in (Loss(), Loss(z_loss=0.1), Loss(label_smoothing=0.3)):
            loss, gradient = ours(logits, targets, num_ranks, kind)
            assert float(loss) == 0.0
            assert torch.equal(gradient, torch.zeros(6, 11))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_logits_may_be_as_large_as_the_dtype_allows(num_ranks: int) -> None:
    exact = torch.tensor(
        [[1e30, -1e30, 0.0, 1e30], [-3e4, -3e4, -3e4, -3e4], [5e4, 0.0, 0.0, 49990.0]]
    ).double()
    targets = torch.tensor([0, 3, 3])
    loss, gradient = ours(exact.float(), targets, num_ranks)
    expected_loss, expected_gradient = by_torch(exact.float().double(), targets)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ids_that_are_ruled_out_have_no_probability(num_ranks: int) -> None:
    """A whole rank's part, too."""
    exact = randn(3, 8)
    exact[0, 4:], exact[1, :4], exact[2, ::2] = -torch.inf, -torch.inf, -torch.inf
    targets = torch.tensor([1, 6, 3])
    loss, gradient = ours(exact.float(), targets, num_ranks)
    expected_loss, expected_gradient = by_torch(exact, targets)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_logits_that_are_no_numbers_show_in_the_loss(value: float, num_ranks: int) -> None:
    logits = randn(3, 8).float()
    logits[1, 2] = value
    assert ours(logits, torch.tensor([1, 6, 3]), num_ranks)[0].isnan()


# ---- with the projection ----


def chunked_on_rank(
    hidden: Tensor, table: Tensor, targets: Tensor, sequence: bool, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    part = vocabulary_range(len(table), group)
    box = Box.whole("table", tuple(table.shape)).rows(part.start, len(part))
    weight = ShardedParameter(table[part.start : part.stop].clone(), [Piece(box)], 1)
    weight.main_grad, weight.on_accumulated = torch.zeros_like(weight, dtype=torch.float32), lambda: None
    share = len(hidden) // group.size()
    mine = hidden[group.rank() * share :][:share] if sequence else hidden
    leaf = mine.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
        terms = token_terms_of_hidden(leaf, weight, targets, part.start, group, sequence)
        loss = cross_entropy_sum(terms, targets, len(table), 0.01, 0.1)
        loss.backward(torch.tensor(SCALE))
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, weight.main_grad


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 10**9])
@pytest.mark.parametrize(("num_ranks", "sequence"), [(1, False), (2, False), (2, True), (4, True)])
def test_the_projection_in_chunks_gives_the_same(num_ranks: int, sequence: bool, chunk_bytes: int) -> None:
    hidden, table, targets = randn(36, 24), randn(101, 24, seed=1, scale=0.2), some_targets(36, 101)
    parts = pool.run(
        chunked_on_rank, num_ranks, hidden.float(), table.float(), targets, sequence, chunk_bytes
    )
    leaves = hidden.clone().requires_grad_(), table.clone().requires_grad_()
    expected = Loss(0.01, 0.1).by_torch(leaves[0] @ leaves[1].t(), targets)
    for_hidden, for_table = torch.autograd.grad(expected * SCALE, leaves)
    assert all(float(part[0]) == pytest.approx(float(expected.detach()), rel=1e-5) for part in parts)
    actual = torch.cat([part[1] for part in parts]) if sequence else parts[0][1]
    assert_close(actual, for_hidden)
    assert_close(torch.cat([part[2] for part in parts]), for_table)


class Made(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def head_on_rank(
    hidden: Tensor, table: Tensor, targets: Tensor, sequence: bool, chunk_bytes: int, recompute: bool
) -> tuple[Tensor, Tensor, int, int]:
    """A policy's loss with its entropy: gradients of hidden and of the table's part.

    Then how often the table's gradient was said to be complete, and the largest tensor's elements.
    """
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    box = Box.whole("lm_head.weight", (len(table), table.shape[1]))
    head = LanguageModelHead(box, group, sequence, None, None, recompute)
    weight = ShardedParameter(table[head.vocabulary.start : head.vocabulary.stop].clone(), head.weight.pieces)
    weight.main_grad, said = torch.zeros_like(weight, dtype=torch.float32), []
    weight.on_accumulated = lambda: said.append(weight.main_grad.clone())
    head.weight = weight
    share = len(hidden) // group.size()
    leaf = (hidden[group.rank() * share :][:share] if sequence else hidden).clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, Made() as made:
        patch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
        terms = head.token_terms(leaf, targets)
        assert terms.entropy is not None
        weights = torch.linspace(-1, 2, len(targets))
        ((terms.log_probabilities + terms.entropy()) * weights).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(said[-1], weight.main_grad), "it is complete when that is said"
    return leaf.grad, weight.main_grad, len(said), made.largest


@pytest.mark.parametrize(("chunk_bytes", "recompute"), [(2000, False), (10**9, False), (10**9, True)])
@pytest.mark.parametrize(("num_ranks", "sequence"), [(1, False), (2, False), (2, True)])
def test_a_policys_loss_with_its_entropy_goes_through_the_head(
    num_ranks: int, sequence: bool, chunk_bytes: int, recompute: bool
) -> None:
    hidden, table, targets = randn(36, 24), randn(101, 24, seed=1, scale=0.2), some_targets(36, 101)
    inputs = hidden.float(), table.float(), targets, sequence, chunk_bytes, recompute
    parts = pool.run(head_on_rank, num_ranks, *inputs)
    leaves = hidden.clone().requires_grad_(), table.clone().requires_grad_()
    log_p = (leaves[0] @ leaves[1].t()).log_softmax(-1)
    taken = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0].where(targets >= 0, 0.0)
    loss = ((taken - (log_p.exp() * log_p).sum(-1)) * torch.linspace(-1, 2, 36)).sum()
    for_hidden, for_table = torch.autograd.grad(loss, leaves)
    assert_close(torch.cat([part[0] for part in parts]) if sequence else parts[0][0], for_hidden)
    assert_close(torch.cat([part[1] for part in parts]), for_table)
    assert {said for _, _, said, _ in parts} == {1}
    if chunk_bytes < 4 * 36 * 101 // num_ranks:
        assert all(largest < 36 * 101 // num_ranks for *_, largest in parts), "no logits of all tokens"


def test_a_chunk_has_whole_tiles_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 11 * 300)
    weight = torch.empty(11, 8)
    assert [module.fits_one_chunk(count, weight) for count in (256, 257)] == [True, False]


# ---- memory ----


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that PyTorch's allocator hands out at once while `run` runs, above what was there before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def peaks_on_rank(logits: Tensor, targets: Tensor) -> tuple[int, int]:
    """Forward and backward of the loss alone, ours and PyTorch's."""
    group = Mesh().tensor
    leaves = [logits.clone().requires_grad_() for _ in range(2)]

    def our_loss() -> None:
        terms = token_terms(leaves[0].detach().requires_grad_(), targets, 0, group)
        cross_entropy_sum(terms, targets, logits.shape[1]).backward()

    def their_loss() -> None:
        wide = leaves[1].to(torch.float32)
        torch.nn.functional.cross_entropy(wide, targets, reduction="sum").backward()

    return peak_bytes(our_loss), peak_bytes(their_loss)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_loss_takes_less_than_half_the_memory(dtype: torch.dtype) -> None:
    """Counting the logits, whose gradient lies over them: no other tensor of their size ever exists."""
    logits, targets = randn(64, 32000).to(dtype), some_targets(64, 32000)
    ((ours, theirs),) = pool.run(peaks_on_rank, 1, logits, targets)
    size = logits.nbytes
    assert ours <= 0.01 * size
    assert size + ours <= 0.5 * (size + theirs)


def entropy_on_rank(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token, with the gradient of it and of what `token_terms` makes of the same logits."""
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    part = vocabulary_range(logits.shape[1], group)
    leaf = logits[:, part.start : part.stop].clone().requires_grad_()
    mine = leaf * 1
    terms = token_terms(mine, targets, part.start, group)
    entropy = entropy_of_logits(mine, group)
    ((terms.log_probabilities + entropy) * torch.linspace(-1, 2, len(targets))).sum().backward()
    assert leaf.grad is not None
    return entropy.detach(), leaf.grad


@pytest.mark.parametrize("vocabulary", [8003, 101, 5])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_entropy_and_its_gradient_do_not_depend_on_the_ranks(
    num_ranks: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * vocabulary * 10)  # several parts, on one process
    exact, targets = randn(37, vocabulary, scale=3.0), some_targets(37, vocabulary)
    parts = pool.run(entropy_on_rank, num_ranks, exact.float(), targets)
    leaf = exact.clone().requires_grad_()
    log_p = leaf.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    taken = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0].where(targets >= 0, 0.0)
    ((taken + entropy) * torch.linspace(-1, 2, 37)).sum().backward()
    for found, _ in parts:
        torch.testing.assert_close(found.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None
    assert_close(torch.cat([gradient for _, gradient in parts], dim=1), leaf.grad)
