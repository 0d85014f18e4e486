"""Where a kernel finds its tensors in memory."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES = ["contiguous", "misaligned", "strided", "strided and misaligned"]


def placed(x: Tensor, place: str) -> Tensor:
    """A copy of x somewhere inside a tensor of NaN: what reads beyond x shows."""
    if place == "contiguous":
        return x.clone()
    if place == "misaligned":
        around = x.new_full((x.numel() + 2,), torch.nan)
        return around[1:-1].view(x.shape).copy_(x)
    before, after = (16, 16) if place == "strided" else (1, 2)
    around = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), torch.nan)
    return around[..., before : before + x.shape[-1]].copy_(x)


def assert_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    """Bit for bit."""
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
