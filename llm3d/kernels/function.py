"""Operations with a backward of their own, which cost no more than a call where no gradient is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Operation(Function):
    """An autograd Function whose `of` leaves autograd out of it under torch.no_grad(), as in text generation.

    There `apply` takes longer than many an operation itself.
    """

    @classmethod
    def of(cls, *args: Any) -> Any:
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(_NoBackward(), *args)


class _NoBackward:
    """What forward is given as its context: it keeps no tensors."""

    class _NoneNeeded:
        def __getitem__(self, index: int) -> bool:
            return False

    needs_input_grad = _NoneNeeded()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def mark_dirty(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass
