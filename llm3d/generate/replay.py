"""Steps of few shapes, recorded once and played again: a GPU has done their kernels before a host has launched them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm3d.kernels.backend import fused

Play = Callable[[], Tensor]
Record = Callable[[Play], Play]


def few_sizes(count: int) -> int:
    """The next of the sizes 1, 2, 4, 8, 16, 24, 32, ..."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def recorder(device: torch.device, wanted: bool) -> Record | None:
    """CUDA graphs, where they are wanted and the kernels in use can be in one."""
    if (
        not wanted
        or device.type != "cuda"
        or fused("kv_cache_append_", torch.empty(0, device=device)) is None
    ):
        return None
    return CudaGraphs()


class CudaGraphs:
    """Records what a function launches. The graphs take turns with the memory that they need meanwhile."""

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
    places: Sequence[Tensor]
    play: Play


class Replayed:
    """A function of tensors, recorded for each shape of them that comes again.

    The first time is done as it is: it makes ready what cannot be made while recording, as communicators.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.seen = set[Hashable]()
        self.recordings: dict[Hashable, _Recording] = {}

    def __call__(
        self, name: Hashable, function: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]
    ) -> Tensor:
        """name: of the function; it reads what changes from the inputs alone."""
        key = (name, *(tuple(x.shape) for x in inputs))
        if key not in self.seen:
            self.seen.add(key)
            return function(inputs)
        if key not in self.recordings:
            places = [x.clone() for x in inputs]
            self.recordings[key] = _Recording(places, self.record(lambda: function(places)))
        recording = self.recordings[key]
        for place, x in zip(recording.places, inputs, strict=True):
            place.copy_(x)
        return recording.play()
