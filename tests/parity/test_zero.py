"""Every ZeRO stage, under every layout, gives the same training as one process."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llm3d.parallel import collectives
from llm3d.parallel.boxes import Box
from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import Trainer
from tests import pool
from tests.closeness import assert_same_tensors
from tests.parity.harness import (
    GLOBAL_BATCH,
    TIED,
    Layout,
    Run,
    microbatches,
    one_process,
    settings,
    train_on_rank,
    trained,
)

AXES = [(1, 1, 2), (1, 1, 4), (2, 1, 2), (2, 1, 4), (1, 2, 2), (1, 2, 4), (2, 2, 2)]  # tensor, pipeline, data


def layout(
    axes: tuple[int, int, int], zero: int, offload: bool, microbatches: int, recompute: bool
) -> Layout:
    tensor, pipeline, data = axes
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        zero=zero,
        offload=float(offload),
        micro=max(1, GLOBAL_BATCH // data // microbatches),
        recompute="full" if recompute else "none",
        sequence=tensor > 1 and recompute,
    )


# All of them; `make test-all` runs those, too, that are not chosen.
ALL = [layout(*case) for case in product(AXES, (0, 1, 2, 3), (False, True), (1, 4), (False, True))]


def chosen(index: int) -> bool:
    """Under given axes of all combinations two: with stage 3, and in turn with stage 1 or 2, which it builds on."""
    axes, rest = divmod(index, 32)
    zero, offload, accumulates, recomputes = rest // 8, rest // 4 % 2, rest // 2 % 2, rest % 2
    pattern = (zero * 3 + axes) % 8
    fits = (offload, accumulates, recomputes) == (pattern // 4, pattern // 2 % 2, pattern % 2)
    return fits and zero in (1 + axes % 2, 3)


LAYOUTS = [
    pytest.param(each, id=str(each), marks=() if chosen(i) else pytest.mark.all_layouts)
    for i, each in enumerate(ALL)
]
LAYOUTS += [
    pytest.param(each, id=str(each))
    for each in (
        Layout(data=2, zero=3, prefetch=3, model=TIED, recompute="selective"),
        Layout(tensor=2, data=4, zero=2, sequence=True, model=TIED, micro=2),
        Layout(pipeline=2, data=2, zero=3, chunks=2, schedule="interleaved", model=TIED, offload=0.5),
        Layout(pipeline=4, data=2, zero=3, schedule="gpipe", model=TIED),
        Layout(tensor=4, data=2, zero=3, micro=2),
        Layout(data=8, zero=3, recompute="full"),
        Layout(data=8, zero=1),
    )
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_depend_on_the_stage(layout: Layout) -> None:
    expected, actual = one_process(layout), trained(layout)
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert_same_tensors(actual.gradients, expected.gradients, 1e-5)
    assert_same_tensors(actual.weights, expected.weights)


def assert_same(actual: Run, expected: Run) -> None:
    assert (actual.losses, actual.grad_norms) == (expected.losses, expected.grad_norms)
    for name, weight in expected.weights.items():
        assert torch.equal(actual.weights[name], weight), name


@pytest.mark.parametrize("data", [pytest.param(2, marks=pytest.mark.all_layouts), 4])
def test_in_bf16_stages_agree_bit_for_bit_where_the_arithmetic_is_the_same(data: int) -> None:
    """With one microbatch stages 1, 2 and 3 add the same numbers in the same order; offload moves them."""
    first = trained(Layout(data=data, zero=1, compute="bf16", micro=8 // data))
    for zero in (2, 3):
        assert_same(trained(Layout(data=data, zero=zero, compute="bf16", micro=8 // data)), first)
    assert_same(trained(Layout(data=data, zero=1, compute="bf16", micro=8 // data, offload=1.0)), first)
    # With several, stages 2 and 3 sum over ranks first and then over microbatches.
    several = trained(Layout(data=data, zero=2, compute="bf16"))
    assert_same(trained(Layout(data=data, zero=3, compute="bf16")), several)
    assert_same(trained(Layout(data=data, zero=3, compute="bf16", prefetch=2)), several)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_of_two_ranks_stage_1_has_the_gradients_of_stage_0_to_the_bit(compute: str) -> None:
    """Of two numbers the sum does not depend on their order. (The norm's squares are grouped differently.)"""
    zero = Layout(data=2, compute=compute)
    expected, actual = trained(zero).gradients, trained(replace(zero, zero=1)).gradients
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


# ---- where reduce-scatter is a collective of its own, as on a GPU ----


def with_native_sums(layout: Layout) -> tuple[Run, dict[str, Any]]:
    with mock.patch.object(collectives, "is_cuda", return_value=True):
        return train_on_rank(layout, 2)


@pytest.mark.parametrize(
    "layout",
    [Layout(data=4, zero=stage) for stage in (1, 2, 3)]
    + [Layout(tensor=2, data=2, zero=3, sequence=True, recompute="full", micro=2)],
    ids=str,
)
def test_training_does_not_depend_on_how_ranks_sum(layout: Layout) -> None:
    expected = one_process(layout)
    for run, _ in pool.run(with_native_sums, layout.world_size, layout):
        assert run.losses == pytest.approx(expected.losses[:2], rel=1e-5)
        assert run.grad_norms == pytest.approx(expected.grad_norms[:2], rel=1e-5)


# ---- narrow moments ----


def all_pieces(layout: Layout) -> list[tuple[Box, Tensor]]:
    """Every piece of the master weights after some steps, owned or not."""
    trainer = Trainer(settings(layout), Mesh(layout.tensor, layout.pipeline))
    trainer.initialize()
    for step in range(4):
        trainer.step(microbatches(layout, step, trainer.mesh.data_rank), 3e-3)
    trainer.flat.wait_all_gathers()
    return [(piece.box, view.clone()) for piece, view in trainer.flat.pieces(trainer.optimizer.master)]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=4, micro=4, sequence=True, moments="bf16"),  # norms, replicated key/value heads
        Layout(pipeline=2, data=2, zero=1, model=TIED, moments="bf16"),
        Layout(pipeline=2, data=2, zero=3, model=TIED, moments="bf16", offload=1.0),
    ],
    ids=str,
)
def test_copies_stay_equal_under_stochastic_rounding(layout: Layout) -> None:
    seen: dict[Box, Tensor] = {}
    num_copies = 0
    for pieces in pool.run(all_pieces, layout.world_size, layout):
        for box, values in pieces:
            num_copies += box in seen
            assert torch.equal(seen.setdefault(box, values), values), box
    assert num_copies > 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_narrow_moments_are_rounded_alike_in_every_stage(zero: int) -> None:
    expected = trained(Layout(data=2, zero=1, micro=4, moments="bf16"))
    assert_same(trained(Layout(data=2, zero=zero, micro=4, moments="bf16")), expected)
