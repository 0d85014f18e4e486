"""What a phase lends to the others comes back as it was."""

from __future__ import annotations

import torch

from llm3d.parallel.mesh import Mesh
from llm3d.train.frozen import OffloadedWeights, released_storage
from llm3d.train.trainer import ShardedModel, Trainer
from tests import pool
from tests.parity.harness import Layout, microbatches, settings


def bytes_of_weights(model: ShardedModel) -> int:
    units = (*model.flat.units, *model.flat.frozen)
    return sum(t.untyped_storage().nbytes() for unit in units for t in {unit.whole, unit.parameters})


def parked_on_rank(layout: Layout) -> tuple[list[float], list[int]]:
    """Losses before parking and after it, twice; the bytes of weights meanwhile."""
    mesh = Mesh(layout.tensor, layout.pipeline)
    model = ShardedModel(settings(layout), mesh)
    model.initialize()
    batches = microbatches(layout, 0, mesh.data_rank)
    losses = [model.evaluate(batches).loss]
    parked = OffloadedWeights(model.flat)
    sizes = [bytes_of_weights(model)]
    for _ in range(2):
        with parked.onload():
            losses.append(model.evaluate(batches).loss)
        sizes.append(bytes_of_weights(model))
    return losses, sizes


def test_a_parked_model_takes_no_memory_and_says_the_same() -> None:
    for layout in (Layout(tensor=2), Layout(data=2, zero=3), Layout(pipeline=2, data=2, zero=1)):
        for losses, sizes in pool.run(parked_on_rank, layout.world_size, layout):
            assert losses[1:] == losses[:1] * 2
            assert sizes == [0, 0, 0]


def lent_on_rank(layout: Layout, lends: bool) -> list[float]:
    mesh = Mesh(layout.tensor, layout.pipeline)
    trainer = Trainer(settings(layout), mesh)
    trainer.initialize()
    norms = []
    for step in range(2):
        norms.append(trainer.step(microbatches(layout, step, mesh.data_rank), 1e-3).grad_norm)
        if lends:
            with released_storage(trainer.flat.kept_gradients):
                assert not any(g.untyped_storage().nbytes() for g in trainer.flat.kept_gradients)
    return norms


def test_gradients_may_be_lent_between_steps() -> None:
    for layout in (Layout(data=2, zero=0), Layout(data=2, zero=1), Layout(data=2, zero=3)):
        assert pool.run(lent_on_rank, 2, layout, True) == pool.run(lent_on_rank, 2, layout, False)


def test_lent_memory_comes_back_empty() -> None:
    tensor = torch.ones(5)
    with released_storage([tensor]):
        assert not tensor.untyped_storage().nbytes()
    assert tensor.tolist() == [0.0] * 5
