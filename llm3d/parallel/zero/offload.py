"""Optimiser steps in host memory: gradients leave the device in chunks, the host steps them, parameters return.

While a chunk is stepped, the next one's gradients arrive and the last one's parameters leave. With bf16 parameters 4
bytes a parameter pass between device and host, and the host reads and writes its state once. Ren et al. 2021
(ZeRO-Offload).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
CHUNK_ELEMENTS_ON_CPU = 2**18  # there both are the same memory, and a chunk stays in a core's cache


@dataclass(frozen=True)
class Chunk:
    """Part of a shard, flat [n].

    gradient, parameter: on the device.  master: fp32 on the host.
    step: called with the gradient on the host, in the compute dtype, and room for the parameter there, which it fills
        (None where the compute dtype is fp32: then the master weights are sent).
    after: called when the parameter is on its way; what it puts on the current stream sees it.
    """

    gradient: Tensor
    parameter: Tensor
    master: Tensor
    step: Callable[[Tensor, Tensor | None], None]
    after: Callable[[], None] | None = None


class Offload:
    """Buffers and streams of one device. dtype: of the parameters, and of what leaves."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.is_cuda = device.type == "cuda"
        self.chunk_elements = CHUNK_ELEMENTS if self.is_cuda else CHUNK_ELEMENTS_ON_CPU
        self.gradients = [self._on_host(self.chunk_elements, dtype) for _ in range(2)]
        self.parameters: list[Tensor] | None = None
        if dtype != torch.float32:
            self.parameters = [self._on_host(self.chunk_elements, dtype) for _ in range(2)]
        self.leaving, self.returning = _Copies(device), _Copies(device)

    def _on_host(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self.is_cuda)

    def like(self, shard: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros in host memory that a device reaches directly, for a shard's state."""
        return torch.zeros(shard.shape, dtype=dtype, pin_memory=self.is_cuda)

    def ranges(self, start: int, stop: int) -> list[slice]:
        """start .. stop in chunks."""
        size = self.chunk_elements
        return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]

    def run(self, chunks: Sequence[Chunk]) -> None:
        """Step the chunks."""
        self.leaving.begin()
        self.returning.begin()
        arrived = [self._fetch(0, chunks[0])] if chunks else []
        returned: list[Any] = []
        for i, chunk in enumerate(chunks):
            if i + 1 < len(chunks):
                arrived.append(self._fetch(i + 1, chunks[i + 1]))
            if i >= 2:
                self.returning.wait(returned[i - 2])  # its room is used again
            self.leaving.wait(arrived[i])
            size = len(chunk.master)
            parameter = None if self.parameters is None else self.parameters[i % 2][:size]
            chunk.step(self.gradients[i % 2][:size], parameter)
            source = chunk.master if parameter is None else parameter
            returned.append(self.returning.copy(chunk.parameter, source))
            if chunk.after is not None:
                self.returning.join()
                chunk.after()

    def _fetch(self, i: int, chunk: Chunk) -> Any:
        return self.leaving.copy(self.gradients[i % 2][: len(chunk.gradient)], chunk.gradient)


class _Copies:
    """Copies between device and host beside what the device computes; on a CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self) -> None:
        """Copies come after what has been put on the current stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Start a copy; -> what `wait` takes. Narrowed where the source is: only the target's dtype travels."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            narrow = source.is_cuda and source.dtype != target.dtype
            target.copy_(source.to(target.dtype) if narrow else source, non_blocking=True)
            return None if self.stream is None else self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Have the host wait for a copy."""
        if copied is not None:
            copied.synchronize()

    def join(self) -> None:
        """What is put on the current stream comes after the copies."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
