"""Signals ask for an end after the step that runs."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

import pytest

from llm3d.train import signals
from llm3d.train.signals import StopSignals
from tests.train.conftest import STOPPING, heed_signals

NUMBERS = list(STOPPING)


@pytest.fixture(autouse=True)
def started_at_a_terminal(signals_heeded: None) -> None: ...


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


def never_return() -> None:
    """Lock a mutex twice: a call that no signal interrupts, as a collective is that another rank never joins."""
    heed_signals()
    signals.GRACE_SECONDS = signals.ANSWER_SECONDS = 0.0

    def ask_to_end() -> None:
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.01)

    mutex = ctypes.create_string_buffer(64)
    try:
        with StopSignals():
            threading.Thread(target=ask_to_end, daemon=True).start()
            for _ in range(2):
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
    except KeyboardInterrupt:  # the signals came before the call
        sys.exit(130)


def test_a_signal_repeated_in_a_call_that_never_returns_ends_the_process() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=never_return)
    process.start()
    process.join(300)
    process.kill()
    assert process.exitcode == 130


@pytest.mark.parametrize("number", NUMBERS)
def test_what_the_process_was_started_to_ignore_stays_ignored(number: signal.Signals) -> None:
    """By nohup, or by a shell that starts it in the background and hands Ctrl-C on to it."""
    signal.signal(number, signal.SIG_IGN)
    with StopSignals() as stop:
        signal.raise_signal(number)
        assert stop.received is None
        assert signal.getsignal(number) is signal.SIG_IGN
    assert signal.getsignal(number) is signal.SIG_IGN
