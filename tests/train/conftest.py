"""What tests of signals share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def heed_signals() -> dict[signal.Signals, Any]:
    """Have this process heed what ends a run, as one does that a terminal starts; -> what it did before."""
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    return before


@pytest.fixture
def signals_heeded() -> Iterator[None]:
    """For the time of a test, whatever started the tests: a shell has what is in the background ignore SIGINT."""
    before = heed_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
