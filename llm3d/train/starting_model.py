"""What a model with adapters was before training: the reference of its policy, or the reward model of its critic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llm3d.models.adapters import adapters_off, is_adapter
from llm3d.models.heads import SCORE
from llm3d.train.trainer import Evaluator


class StartingModel:
    """Found again in the trained model, without a second copy of what is frozen.

    Adapters that started as nothing are left out. Those that started from lora.path, and a score head, get their first
    values back for as long as they are asked for.
    """

    def __init__(self, model: Evaluator) -> None:
        """model: with adapters, and the weights that training starts from."""
        assert model.config.lora.rank
        self.model = model
        self.continued = model.config.lora.path is not None
        self.first = [weight.clone() for weight in self._changed()]

    def _changed(self) -> list[Tensor]:
        """The weights that training changes, and that leaving the adapters out does not put back."""
        return [
            weight
            for piece, weight in self.model.flat.held()
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
            if self.continued:
                yield
            else:
                with adapters_off(self.model.stages):
                    yield
        finally:
            _copy(now, weights)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
