"""Models that are asked and never trained, and memory that one phase of a step lends to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from llm3d.models.adapters import adapters_off, is_adapter
from llm3d.models.heads import SCORE
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.train.trainer import ShardedModel

Kept = Literal["on_device", "offloaded", "in_trained_model"]


class FrozenModel:
    """A reference or reward model: `loaded` gives its weights, as they were when training started.

    kept: where they are between uses. on_device: its own, always there.  offloaded: its own, in host memory.
    in_trained_model: `model` is under training with adapters; it is asked without what training has changed.
    """

    def __init__(self, model: ShardedModel, kept: Kept) -> None:
        self.model, self.kept = model, kept
        self._load: Callable[[], AbstractContextManager[None]] = nullcontext

    def freeze(self) -> None:
        """Keep the weights as they are now; call it when the first weights have been loaded, before training."""
        if self.kept == "in_trained_model":
            self._load = StartingWeights(self.model).restored
        elif self.kept == "offloaded":
            self._load = OffloadedWeights(self.model.flat).onload

    @contextmanager
    def loaded(self) -> Iterator[ShardedModel]:
        """The model with its weights on the device, for the time of the block."""
        with self._load():
            yield self.model


class OffloadedWeights:
    """A model's weights in host memory, and on the device only while they are used. They are never trained."""

    def __init__(self, flat: FlatParameters) -> None:
        """Puts them there. The weights are what they are to stay."""
        flat.wait_all_gathers()
        self.flat = flat
        self.parameters = [
            unit.parameters if unit.frees else unit.whole for unit in (*flat.units, *flat.frozen)
        ]
        self.copies = [_on_host(parameters) for parameters in self.parameters]
        _release(self.parameters)

    @contextmanager
    def onload(self) -> Iterator[None]:
        for parameters, copy in zip(self.parameters, self.copies, strict=True):
            parameters.untyped_storage().resize_(copy.nbytes)
            parameters.copy_(copy, non_blocking=True)
        try:
            yield
        finally:
            self.flat.wait_all_gathers()
            _release(self.parameters)


class StartingWeights:
    """What a model with adapters was before training, without a second copy of what is frozen.

    Adapters that started as nothing are left out. Those that started from lora.path, and a score head, get their first
    values back for as long as they are used.
    """

    def __init__(self, model: ShardedModel) -> None:
        """model: with adapters, and the weights that training starts from."""
        assert model.config.lora.rank
        self.model = model
        self.continued = model.config.lora.path is not None
        self.first = [weight.clone() for weight in self._changed()]

    def _changed(self) -> list[Tensor]:
        """The weights that training changes, and that leaving the adapters out does not put back."""
        return [
            weight
            for piece, weight in self.model.flat.local_weights()
            if piece.box.name == SCORE or (self.continued and is_adapter(piece.box.name))
        ]

    @contextmanager
    @torch.no_grad()
    def restored(self) -> Iterator[None]:
        """The model as it started, for the time of the block. Nothing is trained meanwhile."""
        weights = self._changed()
        now = [weight.clone() for weight in weights]
        _copy(self.first, weights)
        try:
            with nullcontext() if self.continued else adapters_off(self.model.stages):
                yield
        finally:
            _copy(now, weights)


@contextmanager
def released_storage(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Free the tensors' memory for the time of the block; then they are zeros. Each has a storage of its own."""
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
    _release(tensors)
    try:
        yield
    finally:
        for tensor, size in zip(tensors, sizes, strict=True):
            tensor.untyped_storage().resize_(size)
            tensor.zero_()


def _release(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def _on_host(tensor: Tensor) -> Tensor:
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
