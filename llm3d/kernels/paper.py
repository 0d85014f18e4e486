"""What a tensor without data, on the meta device, stands for when a run is planned on paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_stands_for = "cuda"


def is_cuda(x: Tensor) -> bool:
    """Whether x is on a GPU, or stands for a tensor there."""
    return x.is_cuda or (x.is_meta and _stands_for == "cuda")


@contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """For a while, tensors without data stand for tensors on a device of this type: cuda or cpu."""
    global _stands_for
    before, _stands_for = _stands_for, device_type
    try:
        yield
    finally:
        _stands_for = before
