"""Programs that are timed beside each other: each in a process of its own, taking turns within one run."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

import torch

Step = Callable[[], int]  # does a piece of work; -> how much it was, in tokens or what else is counted
MakeStep = Callable[[], Step]  # what can be pickled: a module's function, or a partial of one

_WARM_UP_STEPS = 2


def take_turns(contenders: Mapping[str, MakeStep], rounds: int, steps: int) -> dict[str, list[float]]:
    """What each contender does a second, in each round, over `steps` steps."""
    processes = {name: _Contender(make) for name, make in contenders.items()}
    for process in processes.values():
        process.rate(_WARM_UP_STEPS)
    rates: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            rates[name].append(process.rate(steps))
    for process in processes.values():
        process.end()
    return rates


def report(rates: Mapping[str, list[float]], counted: str = "tokens") -> None:
    """A line of JSON for each contender: by how much the first one is faster, the median of ratios in a round."""
    first = next(iter(rates.values()))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, found in rates.items():
        line: dict[str, object] = {"name": name, f"{counted}_per_s": float(f"{statistics.median(found):.4g}")}
        if found is not first:
            ratios = sorted(our / their for our, their in zip(first, found, strict=True))
            line["llm3d_is_faster_by"] = round(statistics.median(ratios), 3)
            line["spread"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        print(json.dumps(line))
    print(f"load average {os.getloadavg()[0]:.2f}")


class _Contender:
    def __init__(self, make: MakeStep) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        context.Process(target=_contend, args=(make, theirs), daemon=True).start()

    def rate(self, steps: int) -> float:
        """What is done a second, over `steps` steps."""
        self.connection.send(steps)
        return self.connection.recv()

    def end(self) -> None:
        self.connection.send(None)


def _contend(make: MakeStep, connection: Connection) -> None:
    step = make()
    while (steps := connection.recv()) is not None:
        started = time.perf_counter()
        done = sum(step() for _ in range(steps))
        connection.send(done / (time.perf_counter() - started))
