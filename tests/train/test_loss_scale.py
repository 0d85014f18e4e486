"""fp16: the loss scale follows overflows; steps that overflow change nothing; all ranks agree."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from llm3d.checkpoint.load import load_checkpoint
from llm3d.checkpoint.save import save_checkpoint
from llm3d.config import LossScaleConfig, PretrainConfig
from llm3d.parallel.mesh import Mesh
from llm3d.train.loss_scale import LossScale
from llm3d.train.trainer import StepResult, Trainer
from tests import pool
from tests.parity.harness import LEARNING_RATE, Layout, microbatches, settings

SMALL = (("num_hidden_layers", 2), ("hidden_size", 48), ("intermediate_size", 64))
FP16 = Layout(compute="fp16", micro=4, model=SMALL)


def follow(scale: LossScale, overflows: str) -> list[float]:
    """The scale after each step; o is a step that overflows."""
    values = []
    for step in overflows:
        scale.update(step == "o")
        values.append(scale.value)
    return values


@pytest.mark.parametrize(
    ("steps", "values"),
    [
        (".....", [8, 8, 16, 16, 16]),
        ("o.oo.", [8, 8, 4, 2, 2]),  # the first overflow is tolerated
        ("..o...", [8, 8, 8, 8, 8, 16]),  # an overflow begins the interval anew
        ("oo...oo", [8, 4, 4, 4, 8, 8, 4]),  # growth renews the tolerance
    ],
)
def test_the_scale_grows_and_falls_as_it_says(steps: str, values: list[float]) -> None:
    config = LossScaleConfig(initial=8.0, growth_interval=3, hysteresis=2)
    assert follow(LossScale(config), steps) == values
    # Interrupted anywhere, it goes on the same.
    for cut in range(len(steps)):
        first, second = LossScale(config), LossScale(config)
        before = follow(first, steps[:cut])
        second.restore(first.state)
        assert before + follow(second, steps[cut:]) == values


def test_it_underflows_below_its_minimum() -> None:
    scale = LossScale(LossScaleConfig(initial=2.0, hysteresis=1, minimum=1.0))
    follow(scale, "o")
    assert not scale.underflowed
    follow(scale, "o")
    assert scale.underflowed


def with_scale(config: PretrainConfig, **scale: float) -> PretrainConfig:
    precision = config.precision.model_copy(update={"loss_scale": LossScaleConfig(**scale)})
    return config.model_copy(update={"precision": precision})


def steps_on_rank(layout: Layout, steps: int, initial: float) -> tuple[list[StepResult], bool, int]:
    """Results, whether the first step left the weights alone, and the steps that were taken."""
    trainer = Trainer(
        with_scale(settings(layout), initial=initial, hysteresis=1), Mesh(layout.tensor, layout.pipeline)
    )
    trainer.initialize()
    before = [master.clone() for master in trainer.optimizer.master]
    results = []
    unchanged = False
    for step in range(steps):
        results.append(trainer.step(microbatches(layout, step, trainer.mesh.data_rank), LEARNING_RATE))
        if step == 0:
            unchanged = all(map(torch.equal, before, trainer.optimizer.master))
    return results, unchanged, trainer.optimizer.steps_taken


@pytest.mark.parametrize(
    "layout",
    [
        FP16,
        replace(FP16, tensor=2, data=2, zero=2, sequence=True, micro=2),
        replace(FP16, pipeline=2, data=2, zero=1, micro=2),
        replace(FP16, data=4, zero=3, micro=1),
    ],
    ids=str,
)
def test_a_scale_that_is_too_large_is_found_by_all_ranks_together(layout: Layout) -> None:
    parts = pool.run(steps_on_rank, layout.world_size, layout, 14, 2.0**27)
    results, unchanged, taken = parts[0]
    assert [(r.loss_scale, r.skipped, r.problem) for r in results] == [
        (r.loss_scale, r.skipped, r.problem) for r in parts[-1][0]
    ]
    assert results[0].skipped and unchanged and results[0].loss_scale == 2.0**27
    for before, after in pairwise(results):
        assert after.loss_scale == (before.loss_scale / 2 if before.skipped else before.loss_scale)
    taken_steps = [result for result in results if not result.skipped]
    assert 0 < len(taken_steps) == taken
    assert all(math.isfinite(result.grad_norm) and result.problem is None for result in taken_steps)


def test_the_gradient_norm_is_that_without_a_scale() -> None:
    ((scaled, _, _),) = pool.run(steps_on_rank, 1, FP16, 1, 1024.0)
    ((plain, _, _),) = pool.run(steps_on_rank, 1, replace(FP16, compute="fp32"), 1, 1024.0)
    assert plain[0].loss_scale is None
    assert scaled[0].grad_norm == pytest.approx(plain[0].grad_norm, rel=0.01)
    assert scaled[0].loss == pytest.approx(plain[0].loss, rel=1e-3)


def test_gradients_that_overflow_at_the_least_scale_end_training() -> None:
    ((results, unchanged, taken),) = pool.run(steps_with_infinite_gradient, 1)
    assert results[0].skipped and results[0].problem is None
    assert "overflow fp16 even at a loss scale of 1" in str(results[1].problem)
    assert unchanged and taken == 0


def steps_with_infinite_gradient() -> tuple[list[StepResult], bool, int]:
    trainer = Trainer(with_scale(settings(FP16), initial=2.0, hysteresis=1, minimum=1.0), Mesh())
    trainer.initialize()
    finish = trainer.flat.finish_gradients

    def poisoned() -> None:
        finish()
        trainer.flat.gradients[1][5] = math.inf

    trainer.flat.finish_gradients = poisoned  # type: ignore[method-assign]
    before = [master.clone() for master in trainer.optimizer.master]
    results = [trainer.step(microbatches(FP16, step, 0), LEARNING_RATE) for step in range(2)]
    unchanged = all(map(torch.equal, before, trainer.optimizer.master))
    return results, unchanged, trainer.optimizer.steps_taken


def test_a_checkpoint_holds_the_scale(tmp_path: Path) -> None:
    ((expected, actual),) = pool.run(continue_on_rank, 1, tmp_path)
    assert actual == expected


def continue_on_rank(directory: Path) -> tuple[list[float | None], list[float | None]]:
    """Loss scales of steps 3 to 6 without a break, and continued from a checkpoint of step 3."""
    scales: list[list[float | None]] = []
    for resumes in (False, True):
        config = with_scale(settings(FP16), initial=2.0**27, hysteresis=2, growth_interval=2)
        trainer = Trainer(config, Mesh())
        trainer.initialize()
        if resumes:
            load_checkpoint(directory / "checkpoints" / "step-00000003", trainer)
        taken = []
        for step in range(3 if resumes else 0, 6):
            taken.append(trainer.step(microbatches(FP16, step, 0), LEARNING_RATE).loss_scale)
            if step == 2:
                save_checkpoint(directory, 3, trainer, {"step": 3})
        scales.append(taken[-3:])
    return scales[0], scales[1]
