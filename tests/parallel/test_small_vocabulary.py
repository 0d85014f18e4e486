"""A rank to which no token id falls trains along with the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llm3d.data.pretraining import Microbatch
from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import Trainer
from tests import pool
from tests.parity.harness import LEARNING_RATE, Layout, microbatches, settings

VOCAB_SIZE = 5  # over 4 ranks: 2, 2, 1 and 0 ids


def small(batch: Microbatch) -> Microbatch:
    targets = batch.targets
    return replace(
        batch, tokens=batch.tokens % VOCAB_SIZE, targets=targets.where(targets < 0, targets % VOCAB_SIZE)
    )


def train_on_rank(layout: Layout) -> list[tuple[float, float]]:
    mesh = Mesh(layout.tensor, layout.pipeline)
    trainer = Trainer(settings(layout), mesh)
    trainer.initialize()
    steps = []
    for step in range(2):
        batches = [small(batch) for batch in microbatches(layout, step, mesh.data_rank)]
        result = trainer.step(batches, lr=LEARNING_RATE)
        steps.append((result.loss, result.grad_norm))
    return steps


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_without_token_ids_change_nothing(tied: bool) -> None:
    model = (("vocab_size", VOCAB_SIZE), ("num_hidden_layers", 2), ("tie_word_embeddings", tied))
    expected = pool.run(train_on_rank, 1, Layout(micro=4, model=model))[0]
    for layout in (
        Layout(tensor=4, data=2, micro=4, model=model, sequence=True),
        Layout(tensor=4, pipeline=2, micro=4, model=model),
    ):
        for actual in pool.run(train_on_rank, layout.world_size, layout):
            assert [n for step in actual for n in step] == pytest.approx(
                [n for step in expected for n in step], rel=1e-5
            )
