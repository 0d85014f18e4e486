"""What ends a run on one rank ends it on all after the same step; the steps before wait for no other host."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from llm3d.data.pretraining import Microbatch
from llm3d.errors import InputError, Interrupted
from llm3d.parallel import agreement
from llm3d.parallel.mesh import Mesh
from llm3d.train.learner import ModelLearner
from llm3d.train.loop import train
from llm3d.train.report import Report
from llm3d.train.trainer import Trainer
from tests.parity.harness import microbatches, settings
from tests.pool import spawn
from tests.train.conftest import heed_signals
from tests.train.data import LAYOUT, Data

LAYOUTS = {"data": replace(LAYOUT, data=4, micro=2), "model": replace(LAYOUT, tensor=2, pipeline=2)}


def nothing(step: int) -> None: ...


class Ended(NamedTuple):
    saved: list[int]  # after which steps
    error: Exception | None
    messages: int  # between hosts


def run(
    mesh: Mesh,
    layout: str,
    reading: Callable[[int], None] = nothing,
    computing: Callable[[int], None] = nothing,
) -> Ended:
    """Five steps; the functions are called when a step's data is read, and when it is computed."""
    shape = replace(LAYOUTS[layout], model=(*LAYOUT.model, ("num_hidden_layers", 2)))
    saved, messages, steps = list[int](), list[bytes](), list[int]()

    class OfRank(Data):
        def microbatches(self, step: int, mesh: Mesh) -> list[Microbatch]:
            reading(step)
            return microbatches(shape, step, mesh.data_rank)

    def save(step: int) -> Path:
        saved.append(step)
        return Path(f"step-{step}")

    def watched(*args: Any) -> Any:
        steps.append(1)
        computing(len(steps))
        return forward(*args)

    def counted(payload: bytes, *args: Any) -> list[bytes]:
        messages.append(payload)
        return gather(payload, *args)

    trainer = Trainer(settings(shape), mesh)
    trainer.initialize()
    forward, gather, error = trainer.pipeline.run, agreement.gather_bytes, None
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as directory:
        patch.setattr(trainer.pipeline, "run", watched)
        patch.setattr(agreement, "gather_bytes", counted)
        with Report(Path(directory), 0, 5, speaks=False, tensorboard=False) as report:
            try:
                train(ModelLearner(trainer), OfRank(), report, 0, save)
            except (InputError, Interrupted) as raised:
                error = raised
    return Ended(saved, error, len(messages))


def mesh_of(layout: str) -> Mesh:
    return Mesh(LAYOUTS[layout].tensor, LAYOUTS[layout].pipeline)


@spawn(world_size=4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_wait_for_no_other_host(world: Mesh, layout: str) -> None:
    """Before the first, all know whether all can read."""
    assert run(mesh_of(layout), layout) == ([5], None, 1)


@spawn(world_size=4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_signal_to_one_rank_stops_all(mesh: Mesh, layout: str, rank: int) -> None:
    heed_signals()

    def interrupt(step: int) -> None:
        if step == 2 and mesh.rank == rank:
            signal.raise_signal(signal.SIGTERM)

    saved, error, messages = run(mesh_of(layout), layout, computing=interrupt)
    assert saved == [2] and messages == 1
    assert isinstance(error, Interrupted) and "stopped by SIGTERM after step 2 of 5" in str(error)


@spawn(world_size=4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rank", "step"), [(2, 1), (0, 2), (3, 4), (1, 5)])
def test_what_one_rank_cannot_read_ends_all_with_what_is_done_saved(
    mesh: Mesh, layout: str, rank: int, step: int
) -> None:
    def fail(reading: int) -> None:
        if reading == step and mesh.rank == rank:
            raise InputError(f"token 600 of rank {rank}")

    saved, error, messages = run(mesh_of(layout), layout, reading=fail)
    assert saved == [step - 1] * (step > 1) and messages == 1 + (step > 1)
    assert isinstance(error, InputError) and str(error) == f"token 600 of rank {rank}"
