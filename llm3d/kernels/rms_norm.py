"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension. Zhang and Sennrich 2019."""

from __future__ import annotations

import torch
from torch import Tensor

from llm3d.kernels.backend import fake, fused


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: [tokens, hidden], weight: [hidden] -> y like x, and 1 / rms as fp32 [tokens, 1].

    Rounded once, at the end (Hugging Face's LLaMA rounds before the weight, too).
    """
    if op := fused("rms_norm_forward", x):
        return op(x, weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x.dtype))
    inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, inverse_rms).mul_(weight).to(x.dtype), inverse_rms


def add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x becomes x + residual, in place; then as rms_norm_forward. residual: like x."""
    if op := fused("add_rms_norm_forward", x):
        return op(x, residual, weight, eps)
    return rms_norm_forward(x.add_(residual), weight, eps)


def rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, like x, and of the weight, fp32 [hidden].

    grad_sum: like x, a gradient that reached x by another way (the residual stream); it is added.
    With n = x / rms and g = grad_y * weight:
        grad_x = (g - n * mean(g * n)) / rms        grad_weight = sum over tokens of grad_y * n
    """
    if op := fused("rms_norm_backward", x):
        return op(grad_y, x, weight, inverse_rms, grad_sum)
    normalized = x * inverse_rms  # fp32 [tokens, hidden]
    product = grad_y * normalized
    grad_weight = product.sum(0)
    mean = torch.mv(product, weight.to(product.dtype)).div_(x.shape[-1])[:, None]
    grad_x = (grad_y.to(product.dtype) * weight).addcmul_(normalized, mean, value=-1).mul_(inverse_rms)
    if grad_sum is not None:
        grad_x += grad_sum
    return grad_x.to(x.dtype), grad_weight


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@fake("rms_norm_forward")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 1), dtype=_wide(x.dtype))


@fake("add_rms_norm_forward")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 1), dtype=_wide(x.dtype))


@fake("rms_norm_backward")
def _(
    grad_y: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1:], dtype=_wide(x.dtype))
