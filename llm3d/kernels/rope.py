"""Rotary position embeddings, in the half-split convention of Hugging Face's LLaMA. Su et al. 2021."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


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


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [tokens, 1, head_dim / 2] in dtype, for int64 positions [tokens]."""
    angles = (positions[:, None].float() * frequencies)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[..., i], x[..., i + head_dim / 2]), in place. x: [tokens, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    rotated = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)
    return x


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.num_rotated = num_rotated
        rotate_(qkv[:, :num_rotated], cos, sin)
        ctx.mark_dirty(qkv)
        return qkv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0].contiguous()  # made by the backward of a split just now, so it may be overwritten
        rotate_(grad[:, : ctx.num_rotated], cos, -sin)
        return grad, None, None, None


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    """Rotate the first `num_rotated` heads (queries and keys) of qkv, in place.

    qkv: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2]. Backward: the inverse rotation.
    """
    return _Rope.apply(qkv, cos, sin, num_rotated)
