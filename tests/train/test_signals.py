"""Signals ask for an end after the step that runs; all ranks agree on it."""

from __future__ import annotations

import signal

import pytest

from llm3d.parallel.mesh import Mesh
from llm3d.train import signals
from llm3d.train.signals import StopSignals
from tests.pool import spawn

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_remembered_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_what_a_launcher_repeats_changes_nothing() -> None:
    said = list[str]()
    with StopSignals(said.append) as stop:
        for number in NUMBERS:
            signal.raise_signal(number)
        assert stop.received == signal.SIGINT
    assert len(said) == 1 and said[0].startswith("SIGINT: training ends when this step is done and saved")


def test_a_signal_repeated_later_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(signals, "GRACE_SECONDS", -1.0)  # any time is later than this
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGTERM


@spawn(world_size=4, tensor=2)
def test_a_signal_to_one_rank_stops_all(mesh: Mesh) -> None:
    with StopSignals() as stop:
        assert stop.agreed(mesh.everyone) is None
        if mesh.rank == 2:
            signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(mesh.everyone) == signal.SIGTERM
        assert stop.received == (signal.SIGTERM if mesh.rank == 2 else None)
