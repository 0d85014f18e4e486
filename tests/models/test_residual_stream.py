"""Sums of the residual stream, and of its gradient, are made in the norms' passes over memory, not beside them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import Trainer
from tests import pool
from tests.kernels.backends import needs_native
from tests.parity.harness import LEARNING_RATE, MODEL, Layout, microbatches, settings


class Sums(TorchDispatchMode):
    """How many additions make, or change, a tensor of some shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        adds = func.overloadpacket.__name__ in ("add", "add_")
        self.count += adds and isinstance(result, Tensor) and tuple(result.shape) == self.shape
        return result


def sums_on_rank(layout: Layout) -> float:
    """Of activations, in forward and backward of a microbatch."""
    mesh = Mesh(layout.tensor, layout.pipeline)
    trainer = Trainer(settings(layout), mesh)
    trainer.initialize()
    batches = microbatches(layout, 0, mesh.data_rank)
    hidden_size = int(str(MODEL["hidden_size"]))
    with Sums((len(batches[0].tokens), hidden_size)) as sums:
        trainer.step(batches, LEARNING_RATE)
    return sums.count / len(batches)


@needs_native
@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(micro=4), [0]),
        (Layout(micro=4, recompute="selective"), [0]),
        (Layout(pipeline=2, micro=4), [1, 0]),  # what goes to the next stage is the whole stream
    ],
    ids=str,
)
def test_no_sum_is_made_beside_the_norms(layout: Layout, expected: list[int]) -> None:
    assert pool.run(sums_on_rank, layout.world_size, layout) == expected
