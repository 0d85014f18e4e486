"""What the parts of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timing:
    """Of the parts of a step, by name: seconds, and on a GPU the most memory that was allocated, in GiB."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.peaks = device, dict[str, float](), dict[str, float]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        on_gpu, started = self.device.type == "cuda", time.perf_counter()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if on_gpu:
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def metrics(self) -> dict[str, float]:
        metrics = {f"timing_s/{name}": seconds for name, seconds in self.seconds.items()}
        if self.peaks:
            metrics |= {f"memory_gib/{name}": peak for name, peak in self.peaks.items()}
            metrics["memory_gib"] = max(self.peaks.values())
        return metrics
