"""What several ranks do, one does alone: it sends to itself, and trains as without. So one GPU runs all collectives."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from llm3d.parallel import collectives
from tests import pool
from tests.closeness import assert_same_tensors
from tests.gpu import RUNS_ON_GPU
from tests.parity.harness import Layout, Run, put_together, train_on_rank

LAYOUTS = [
    Layout(micro=2),
    Layout(micro=2, zero=1),
    Layout(micro=2, zero=2),
    Layout(micro=2, zero=3, sequence=True, recompute="full"),
    Layout(micro=2, sequence=True, recompute="selective"),
]


def train_alone(layout: Layout, device: str, as_on_a_gpu: bool = False) -> tuple[Run, list[str]]:
    """Groups of one communicate; -> the run, and the collectives over gradients and parameters that it took."""
    taken: list[str] = []

    def counting(name: str, collective: object) -> object:
        def counted(*args: object, **kwargs: object) -> object:
            taken.append(name)
            return collective(*args, **kwargs)

        return counted

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(collectives, "_FEWEST", 1))
        if as_on_a_gpu:
            stack.enter_context(mock.patch.object(collectives, "is_cuda", return_value=True))
        for module, name in (
            (dist, "all_reduce"),
            (dist, "all_to_all_single"),
            (collectives, "_all_gather"),
            (collectives, "_reduce_scatter"),
        ):
            stack.enter_context(mock.patch.object(module, name, counting(name, getattr(module, name))))
        return put_together([train_on_rank(layout, 3, device)]), taken


def expected_collectives(layout: Layout, native: bool) -> set[str]:
    scatters = "_reduce_scatter" if native else "all_to_all_single"
    found = {"all_reduce"}
    found |= {"_all_gather", scatters} if layout.zero or layout.sequence else set()
    return found


def assert_same_training(actual: Run, expected: Run) -> None:
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert_same_tensors(actual.gradients, expected.gradients, 1e-5)


def plain(layout: Layout, device: str) -> Run:
    return put_together([train_on_rank(replace(layout, zero=0, sequence=False), 3, device)])


def on_the_cpu(layout: Layout) -> None:
    expected = plain(layout, "cpu")
    for as_on_a_gpu in (False, True):
        run, taken = train_alone(layout, "cpu", as_on_a_gpu)
        assert_same_training(run, expected)
        assert expected_collectives(layout, as_on_a_gpu) <= set(taken)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_alone_trains_as_without_collectives(layout: Layout) -> None:
    pool.run(on_the_cpu, 1, layout)


class TestOnGPU:
    pytestmark = RUNS_ON_GPU

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_a_gpu_alone_trains_as_without_collectives(self, layout: Layout) -> None:
        """Over NCCL."""
        torch.backends.cuda.matmul.allow_tf32 = False
        run, taken = train_alone(layout, "cuda")
        assert_same_training(run, plain(layout, "cuda"))
        assert expected_collectives(layout, native=True) <= set(taken)
