"""The first messages between stages find kernels loaded; loading them changes nothing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from llm3d.parallel.mesh import Mesh
from llm3d.parallel.pipeline import Pipeline
from llm3d.train.trainer import Trainer
from tests import pool
from tests.parity.harness import Layout, OnRank, microbatches, settings, take_steps

LAYOUTS = [
    Layout(pipeline=2, micro=2),
    Layout(pipeline=2, micro=2, compute="fp16", recompute="selective"),
    Layout(pipeline=2, chunks=2, schedule="interleaved", model=(("num_hidden_layers", 4),)),
    Layout(tensor=2, pipeline=2, sequence=True, micro=2),
    *(Layout(pipeline=2, data=2, zero=zero, micro=2) for zero in (0, 1, 2, 3)),
    Layout(pipeline=2, model=(("tie_word_embeddings", True),)),
]
MESSAGES = ("send", "recv", "isend", "irecv", "batch_isend_irecv")


def train_warmed_up(layout: Layout) -> OnRank:
    mesh = Mesh(layout.tensor, layout.pipeline)
    trainer = Trainer(settings(layout), mesh)
    trainer.initialize()
    random, state = torch.get_rng_state(), trainer.state
    batch = microbatches(layout, 0, mesh.data_rank)[0]
    with mock.patch.multiple(dist, **dict.fromkeys(MESSAGES, mock.Mock(side_effect=AssertionError))):
        trainer.warm_up(batch)
        with torch.no_grad():
            trainer.pipeline.warm_up(batch, trainer.objective)
    assert torch.equal(torch.get_rng_state(), random) and trainer.state == state
    return take_steps(trainer, lambda step: microbatches(layout, step, mesh.data_rank), 2)


def train_cold(layout: Layout) -> OnRank:
    mesh = Mesh(layout.tensor, layout.pipeline)
    trainer = Trainer(settings(layout), mesh)
    trainer.initialize()
    return take_steps(trainer, lambda step: microbatches(layout, step, mesh.data_rank), 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_after_a_warm_up_is_the_same_to_the_bit(layout: Layout) -> None:
    warm, cold = (pool.run(train, layout.world_size, layout) for train in (train_warmed_up, train_cold))
    for (run, pieces), (expected, expected_pieces) in zip(warm, cold, strict=True):
        said = repr((run.losses, run.grad_norms))  # fp16's first steps may overflow, to nan
        assert said == repr((expected.losses, expected.grad_norms))
        for name in expected_pieces:
            for (box, value), (_, other) in zip(pieces[name], expected_pieces[name], strict=True):
                assert torch.equal(value.nan_to_num(7), other.nan_to_num(7)), box


def count_warm_ups(device: str) -> list[bool]:
    """Whether gradients were on in each, of two evaluations and two steps."""
    layout, seen = Layout(pipeline=2), list[bool]()
    trainer = Trainer(settings(layout), Mesh(pipeline=2))
    trainer.initialize()
    batches = microbatches(layout, 0, 0)
    warm_up = trainer.pipeline.warm_up

    def counted(*args: Any) -> None:
        seen.append(torch.is_grad_enabled())
        warm_up(*args)

    trainer.pipeline.warm_up = counted  # type: ignore[assignment, method-assign]
    looks_like = mock.Mock(wraps=trainer.mesh, device=torch.device(device), pipeline_size=2)
    is_cold: Any = Pipeline.is_cold
    cold = property(lambda self: is_cold.fget(mock.Mock(mesh=looks_like, _warm=self._warm)))
    kind = type("On" + device, (Pipeline,), {"is_cold": cold})
    trainer.pipeline.__class__ = kind
    for _ in range(2):
        trainer.evaluate(batches)
        trainer.step(batches, lr=1e-3)
    return seen


@pytest.mark.parametrize(("device", "expected"), [("cuda", [False, True]), ("cpu", [])])
def test_a_gpu_is_warmed_up_once_for_training_and_once_for_evaluation(
    device: str, expected: list[bool]
) -> None:
    assert pool.run(count_warm_ups, 2, device) == [expected] * 2
