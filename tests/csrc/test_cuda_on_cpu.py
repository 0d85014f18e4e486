"""The emulation computes what a GPU would, and shows what would be wrong on one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

EXAMPLES = [
    "sums",
    "shuffles",
    "missing_barrier",
    "order_of_blocks",
    "barrier_after_return",
    "different_barriers",
    "absent_lane",
    "half_a_warp",
]


def run(emulated: torch._ops._OpNamespace, example: str) -> Tensor:
    """What two blocks of two warps wrote: [2, 64]."""
    return emulated.example(torch.empty(0), EXAMPLES.index(example))


def test_shuffles_votes_and_barriers_are_those_of_a_gpu(emulated: torch._ops._OpNamespace) -> None:
    assert torch.equal(run(emulated, "sums"), torch.full((2, 64), 64 * 63 / 2))
    assert torch.equal(run(emulated, "shuffles"), torch.ones(2, 64))


def test_a_missing_barrier_shows(emulated: torch._ops._OpNamespace) -> None:
    read = run(emulated, "missing_barrier")
    assert (read == 0).any()


def test_blocks_do_not_run_in_ascending_order(emulated: torch._ops._OpNamespace) -> None:
    assert torch.equal(run(emulated, "order_of_blocks")[0], torch.zeros(64))


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ("barrier_after_return", "a __syncthreads that some threads have returned before"),
        ("different_barriers", "threads of a block are at different __syncthreads"),
        ("absent_lane", "lanes of a warp wait in vain for others of it"),
        ("half_a_warp", "lanes of a warp wait in vain for others of it"),
    ],
)
def test_what_would_hang_is_an_error(emulated: torch._ops._OpNamespace, example: str, problem: str) -> None:
    with pytest.raises(RuntimeError, match=rf"examples\.cu:\d+: {problem}"):
        run(emulated, example)
    assert torch.equal(run(emulated, "shuffles"), torch.ones(2, 64))  # the next kernel is not disturbed
