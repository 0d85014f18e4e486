"""Steps of few shapes, recorded once and played again: a GPU has done their kernels before a host has launched them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from llm3d.kernels.backend import fused

Play = Callable[[], Tensor]
Record = Callable[[Play], Play]
Graphs = Callable[[], Record]


def padded_count(count: int) -> int:
    """The next of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ..., which are few."""
    above = 1 << (count - 1).bit_length()
    return above * 3 // 4 if above > 16 and count <= above * 3 // 4 else above


def graphs_for(device: torch.device, enabled: bool) -> Graphs | None:
    """CUDA graphs, where they are wanted and the kernels in use can be in one."""
    if not enabled or device.type != "cuda":
        return None
    return CudaGraphs if fused("kv_cache_append_", torch.empty(0, device=device)) else None


class CudaGraphs:
    """Records what a function launches. The graphs take turns with the memory that they need meanwhile, which is gone
    with the last of them: other graphs want another of these.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Play) -> Play:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = function()

        def play() -> Tensor:
            graph.replay()
            return out.clone()  # the next turn writes there again

        return play


class _Recording(NamedTuple):
    places: dict[str, Tensor]
    play: Play


class GraphRunner:
    """A function of tensors, recorded for each shape of them that comes again.

    The first time is done as it is: it makes ready what cannot be made while recording, as communicators.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.recordings: dict[Hashable, _Recording | None] = {}  # None: seen once

    def __call__(
        self, of: Hashable, function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]
    ) -> Tensor:
        """of: tells functions apart, each of which reads what changes from its inputs alone."""
        key = (of, *(tuple(x.shape) for x in inputs.values()))
        if key not in self.recordings:
            self.recordings[key] = None
            return function(inputs)
        recording = self.recordings[key]
        if recording is None:
            places = {name: x.clone() for name, x in inputs.items()}
            recording = self.recordings[key] = _Recording(places, self.record(lambda: function(places)))
        for name, x in inputs.items():
            recording.places[name].copy_(x)
        return recording.play()
