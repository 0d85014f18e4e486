"""Memory that one phase of a step does not need, lent to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llm3d.parallel.zero.flat import FlatParameters
from llm3d.train.trainer import Evaluator, Trainer


class Parked:
    """A model's weights in host memory, and on the device only while they are asked for. They are never trained."""

    def __init__(self, flat: FlatParameters) -> None:
        """Puts them there. The weights are what they are to stay."""
        flat.settle()
        self.flat = flat
        self.homes = [unit.parameters if unit.frees else unit.whole for unit in (*flat.units, *flat.frozen)]
        self.copies = [_on_host(home) for home in self.homes]
        _let_go(self.homes)

    @contextmanager
    def on_the_device(self) -> Iterator[None]:
        for home, copy in zip(self.homes, self.copies, strict=True):
            home.untyped_storage().resize_(copy.nbytes)
            home.copy_(copy, non_blocking=True)
        try:
            yield
        finally:
            self.flat.settle()
            _let_go(self.homes)


def _on_host(tensor: Tensor) -> Tensor:
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor)


@contextmanager
def without_memory(tensors: Sequence[Tensor]) -> Iterator[None]:
    """For the time of the block; then they are zeros. Each has a storage of its own."""
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
    _let_go(tensors)
    try:
        yield
    finally:
        for tensor, size in zip(tensors, sizes, strict=True):
            tensor.untyped_storage().resize_(size)
            tensor.zero_()


def _let_go(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def what_it_keeps(model: Evaluator) -> str:
    """Of this rank's memory, between steps, for people."""
    flat = model.flat
    units = (*flat.units, *flat.frozen)
    parts = {"weights": sum((unit.parameters if unit.frees else unit.whole).nbytes for unit in units)}
    if isinstance(model, Trainer):
        state = [tensor for tensors in model.optimizer.state.values() for tensor in tensors]
        parts["gradients"] = sum(gradients.nbytes for gradients in flat.kept_gradients)
        parts["optimizer"] = sum(tensor.nbytes for tensor in state)
    return ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
