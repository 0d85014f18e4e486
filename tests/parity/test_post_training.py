"""Every layout trains on conversations and comparisons as one process does."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from llm3d.data.conversations import ChatData
from llm3d.data.packed import PackedBatch
from llm3d.data.samples import Sample, SampleSet, Tokens
from llm3d.models.build import initial_value
from llm3d.parallel.mesh import Mesh
from llm3d.stages.kto import KTOReference
from llm3d.train.trainer import Trainer
from tests import pool
from tests.closeness import assert_same_tensors
from tests.parity.harness import (
    GLOBAL_BATCH,
    NUM_STEPS,
    SEQUENCE_LENGTH,
    TIED,
    VOCAB_SIZE,
    Layout,
    OnRank,
    Run,
    put_together,
    shape_of,
    take_steps,
)
from tests.parity.stage_settings import STAGE_SETTINGS, settings
from tests.stages.common import trained_model

LAYOUTS = [
    Layout(tensor=2, micro=4, sequence=True),
    Layout(tensor=4, micro=4, recompute="full", model=TIED),
    Layout(pipeline=2, micro=3, schedule="gpipe", model=TIED),
    Layout(pipeline=2, chunks=2, micro=4, schedule="interleaved"),
    Layout(data=4, micro=4, zero=1),
    Layout(data=2, micro=2, zero=3, recompute="selective"),
    Layout(tensor=2, data=2, micro=5, sequence=True, zero=2, recompute="selective"),
    Layout(tensor=2, pipeline=2, data=2, micro=4, sequence=True, zero=3, model=TIED),
    Layout(tensor=2, pipeline=4, micro=4, zero=0),
]


def random_samples(stage: str, count: int = 3 * GLOBAL_BATCH + 1) -> SampleSet:
    random = np.random.default_rng(3)
    samples = []
    for _ in range(count):
        alone = stage.startswith(("sft", "kto"))
        prompt, num_replies = _tokens(random, 2, 8, learned=False), 1 if alone else 2
        replies = [_tokens(random, 2, SEQUENCE_LENGTH - 8, learned=True) for _ in range(num_replies)]
        sequences = tuple(
            Tokens(*(np.concatenate(pair) for pair in zip(prompt, reply, strict=True))) for reply in replies
        )
        ranks = (float(random.random() < 0.4),) if stage == "kto" else tuple(map(float, range(num_replies)))
        samples.append(Sample(sequences, ranks, float(random.random())))
    return SampleSet.of(samples)


def _tokens(random: np.random.Generator, low: int, high: int, learned: bool) -> Tokens:
    ids = (VOCAB_SIZE * random.random(random.integers(low, high + 1)) ** 3).astype(np.int32)
    return Tokens(ids, np.full(len(ids), learned))


def train_on_rank(stage: str, layout: Layout, steps: int = NUM_STEPS) -> OnRank:
    config, mesh = settings(stage, layout), Mesh(layout.tensor, layout.pipeline)
    data = ChatData(config, [random_samples(stage)], [], mismatched=stage == "kto")
    trainer = Trainer(config, mesh, trained_model(config).objective)
    trainer.initialize()
    for piece, weight in trainer.weights():
        if piece.box.name.endswith("lora_B.weight"):  # at 0, where training starts, A has no gradient
            weight.copy_(initial_value(replace(piece.box, name="any"), config.model, seed=1))
    trainer.publish()
    reference = reference_of(trainer) if stage == "kto" else None

    def batches(step: int) -> Sequence[PackedBatch]:
        found = data.microbatches(step + 1, mesh)
        return found if reference is None else reference.complete(found)

    return take_steps(trainer, batches, steps)


def reference_of(trainer: Trainer) -> KTOReference:
    """A model with larger weights, so that replies are more, or less, likely than by the trained one."""
    reference = KTOReference(trainer)
    model = reference.live.frozen.model
    model.initialize()
    for _, weight in model.weights():
        weight.mul_(1.5)
    model.publish()
    return reference


@functools.cache
def trained(stage: str, layout: Layout) -> Run:
    return put_together(pool.run(train_on_rank, layout.world_size, stage, layout))


def one_process(stage: str, layout: Layout) -> Run:
    return trained(stage, Layout(model=shape_of(layout), micro=GLOBAL_BATCH))


def chosen(stage: str, layout: int) -> bool:
    """Each layout with the whole weights of one stage and the adapters of one, and that of all axes with every stage.

    An objective sees only what the head says on the last pipeline stage. How that came about, by layers, groups and
    shards, is the same for all.
    """
    alike = [other for other in STAGE_SETTINGS if other.endswith("lora") == stage.endswith("lora")]
    all_axes = LAYOUTS[layout].data > 1 and LAYOUTS[layout].world_size == 8
    return all_axes or (alike.index(stage) + layout) % len(alike) == 0


CASES = [
    pytest.param(
        stage, layout, id=f"{stage}-{layout}", marks=[] if chosen(stage, i) else pytest.mark.all_layouts
    )
    for stage in STAGE_SETTINGS
    for i, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("stage", "layout"), CASES)
def test_training_does_not_depend_on_the_layout(stage: str, layout: Layout) -> None:
    expected, actual = one_process(stage, layout), trained(stage, layout)
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert_same_tensors(actual.gradients, expected.gradients, 1e-5)
    assert_same_tensors(actual.weights, expected.weights)


@pytest.mark.parametrize("stage", STAGE_SETTINGS)
def test_training_does_not_depend_on_packing(stage: str) -> None:
    expected = one_process(stage, Layout())
    for micro in (2, 3):
        run = trained(stage, replace(Layout(), micro=micro))
        assert run.losses == pytest.approx(expected.losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
