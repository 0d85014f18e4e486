"""Optimiser steps in host memory: gradients leave the device in chunks, the host steps them, parameters return.

While a chunk is stepped, the next one's gradients arrive and the last one's parameters leave. With bf16 parameters 4
bytes a parameter pass between device and host, and the host reads and writes its state once. Ren et al. 2021
(ZeRO-Offload).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Chunk:
    """Part of a shard, flat [n].

    gradient, parameter: on the device.  master: fp32 on the host.
    step: called with the gradient on the host and room for the parameter there, which it fills (None where the
        compute dtype is fp32: then the master weights are sent).
    after: called when the parameter is on its way; what it puts on the current stream sees it.
    """

    gradient: Tensor
    parameter: Tensor
    master: Tensor
    step: Callable[[Tensor, Tensor | None], None]
    after: Callable[[], None] | None = None


class Offload:
    """Buffers and streams of one device. dtype: of the parameters, and of what leaves.

    staged: gradients and parameters pass through buffers that the device reaches directly. Where it is the host's
    processor itself, what it has is in host memory already, and is stepped where it lies.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, staged: bool, chunk_elements: int = CHUNK_ELEMENTS
    ) -> None:
        self.is_cuda, self.chunk_elements = device.type == "cuda", chunk_elements
        self.host = device if device.type == "meta" else torch.device("cpu")
        self.sends_master = dtype == torch.float32
        self.gradients = [self._room(dtype) for _ in range(2 * staged)]
        self.parameters = [self._room(dtype) for _ in range(2 * (staged and not self.sends_master))]
        self.leaving, self.returning = _Copies(device), _Copies(device)

    def _room(self, dtype: torch.dtype) -> Tensor:
        return self.zeros(self.chunk_elements, dtype)

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return sum(buffer.nbytes for buffer in (*self.gradients, *self.parameters))

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] in host memory, which the device reaches directly.

        PyTorch's own pinned memory is rounded up to a power of two, which for this much is too wasteful.
        """
        buffer = torch.zeros(size, dtype=dtype, device=self.host)
        if self.is_cuda and size:
            runtime: Any = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
            weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, buffer.data_ptr())
        return buffer

    def ranges(self, start: int, stop: int) -> list[slice]:
        """start .. stop in chunks."""
        size = self.chunk_elements
        return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]

    def run(self, chunks: Sequence[Chunk]) -> None:
        """Step the chunks."""
        self.leaving.begin()
        self.returning.begin()
        arriving = [self._fetch(i, chunk) for i, chunk in enumerate(chunks[:1])]
        returning: list[Any] = []
        for i, chunk in enumerate(chunks):
            arriving += [self._fetch(j, chunks[j]) for j in range(i + 1, min(i + 2, len(chunks)))]
            if i >= 2:
                self.returning.wait(returning[i - 2])  # its room is used again
            gradient, arrived = arriving[i]
            self.leaving.wait(arrived)
            parameter = self._room_for_parameter(i, chunk)
            chunk.step(gradient, parameter)
            source = chunk.master if parameter is None else parameter
            returning.append(
                None if source is chunk.parameter else self.returning.copy(chunk.parameter, source)
            )
            if chunk.after is not None:
                self.returning.join()
                chunk.after()

    def _fetch(self, i: int, chunk: Chunk) -> tuple[Tensor, Any]:
        """The chunk's gradient on the host, and what tells when it is there."""
        if not self.gradients:
            return chunk.gradient, None
        room = self.gradients[i % 2][: len(chunk.gradient)]
        return room, self.leaving.copy(room, chunk.gradient)

    def _room_for_parameter(self, i: int, chunk: Chunk) -> Tensor | None:
        if self.sends_master:
            return None
        return self.parameters[i % 2][: len(chunk.parameter)] if self.parameters else chunk.parameter


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
