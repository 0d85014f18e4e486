"""Ctrl-C, SIGTERM and Slurm's SIGUSR1 end training after the step that runs, on all ranks together.

What one rank has received it tells the others with the numbers of a step: `llm3d.train.trainer.Notice`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

GRACE_SECONDS = 5.0  # a launcher repeats the signal that the terminal has sent already


class StopSignals:
    """Remembers the first signal; one that comes more than GRACE_SECONDS later ends the process at once.

    What the process was started to ignore stays ignored: SIGINT in a shell's background, where Ctrl-C is for others.

    say: tells the user what comes of the first.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self.say = say
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            self.say(f"{name}: training ends when this step is done and saved; once more ends it at once")
        elif time.monotonic() - self._at > GRACE_SECONDS:
            raise KeyboardInterrupt
