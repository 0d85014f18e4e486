"""Ctrl-C, SIGTERM and Slurm's SIGUSR1 end training after the step that runs, on all ranks together.

What one rank has received it tells the others with the numbers of a step: `llm3d.train.trainer.Notice`.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

GRACE_SECONDS = 5.0  # a launcher repeats the signal that the terminal has sent already
ANSWER_SECONDS = 5.0  # in which Python heeds a signal if it can


class StopSignals:
    """Remembers the first signal; one that comes more than GRACE_SECONDS later ends the process at once.

    Python heeds a signal between two calls of the main thread. Where one does not return, such as a collective that
    another rank never joins, a thread that the signal wakes ends the process.

    What the process was started to ignore stays ignored: SIGINT in a shell's background, where Ctrl-C is for others.

    say: tells the user what comes of the first.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self.say = say
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}
        self._heeded = threading.Event()

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        self._wakes, woken = socket.socketpair()
        self._wakes.setblocking(False)
        self._waker_before = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(woken,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._waker_before)
        self._wakes.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            self.say(f"{name}: training ends when this step is done and saved; once more ends it at once")
        elif time.monotonic() - self._at > GRACE_SECONDS:
            self._heeded.set()
            raise KeyboardInterrupt

    def _watch(self, woken: socket.socket) -> None:
        """See to it that the second signal ends the process, with the exit code of one that heeds it."""
        first: float | None = None
        with woken:
            while numbers := woken.recv(1):
                now = time.monotonic()
                if numbers[0] not in self._before:
                    continue
                if first is None:
                    first = now
                elif now - first > GRACE_SECONDS and not self._heeded.wait(ANSWER_SECONDS):
                    os._exit(130)
