"""Rotary position embeddings, in the half-split convention of Hugging Face's LLaMA. Su et al. 2021."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm3d.kernels.backend import fake, fused
from llm3d.kernels.function import Operation


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None = None) -> Tensor:
    """fp32 [head_dim / 2] on the CPU: radians a position, theta^(-2i / head_dim), scaled.

    scaling: None, {"rope_type": "linear", "factor": f} (Chen et al. 2023, position interpolation), or
    {"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    (Llama 3.1: wavelengths beyond original / low_freq_factor are slowed by `factor`, those below
    original / high_freq_factor are kept, those between are interpolated).
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    assert scaling["rope_type"] == "llama3", "configuration admits linear and llama3"
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


def rope_tables(num_positions: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at positions 0, 1, ...: fp32 [positions, head_dim / 2] each."""
    at = torch.arange(num_positions, device=frequencies.device, dtype=torch.float32)
    angles = torch.outer(at, frequencies)
    return angles.cos(), angles.sin()


class RopeTables:
    """`rope_tables`, computed again only for more positions than before, or on another device."""

    def __init__(self) -> None:
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, num_positions: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Of so many positions or more; the frequencies are the same in every call."""
        kept = self._tables
        if kept is None or len(kept[0]) < num_positions or kept[0].device != frequencies.device:
            kept = self._tables = rope_tables(num_positions, frequencies)
        return kept


def rope(qkv: Tensor, head_dim: int, cos: Tensor, sin: Tensor, positions: Tensor, num_rotated: int) -> Tensor:
    """Rotate the first `num_rotated` heads (queries and keys) of qkv, in place.

    qkv: [tokens, heads * head_dim], contiguous, and no view, which autograd would copy.
    positions: int32 [tokens], of each token in its sequence.  cos, sin: of rope_tables, for all of them.
    Backward: the inverse rotation, over the gradient that it is given, which `attention` has made: the result is to be
    used for nothing else.
    """
    return _Rope.of(qkv, head_dim, cos, sin, positions, num_rotated)


class _Rope(Operation):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        head_dim: int,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        num_rotated: int,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.num_rotated, ctx.head_dim = num_rotated, head_dim
        rotate_(qkv.unflatten(1, (-1, head_dim))[:, :num_rotated], cos, sin, positions)
        ctx.mark_dirty(qkv)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        grad = grads[0].contiguous()  # made by attention's backward just now, so it may be overwritten
        cos, sin, positions = ctx.saved_tensors
        heads = grad.unflatten(1, (-1, ctx.head_dim))[:, : ctx.num_rotated]
        rotate_(heads, cos, sin, positions, inverse=True)
        return grad, None, None, None, None, None


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool = False) -> None:
    """Turn the pairs (x[..., i], x[..., i + head_dim / 2]), in place, by the angles of their tokens' positions.

    x: [tokens, heads, head_dim], of any strides but a last of 1; the rest as in `rope`.
    """
    if op := fused("rope_", x):
        op(x, cos, sin, positions, inverse)
        return
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    first, second = x.chunk(2, dim=-1)
    if inverse:
        sin = -sin
    turned = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(turned)


@fake("rope_")
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> None:
    return None
