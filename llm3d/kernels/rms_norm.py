"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension. Zhang and Sennrich 2019."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: [tokens, hidden], weight: [hidden] -> y like x, and 1 / rms as fp32 [tokens, 1].

    As in Hugging Face's LLaMA, the normalised x is rounded to x's dtype before it meets the weight.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, inverse_rms).to(x.dtype).mul_(weight), inverse_rms


def rms_norm_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, like x, and of the weight, fp32 [hidden].

    With n = x / rms and g = grad_output * weight:
        grad_x = (g - n * mean(g * n)) / rms        grad_weight = sum over tokens of grad_output * n
    """
    normalised = x * inverse_rms  # fp32 [tokens, hidden]
    product = grad_output * normalised
    grad_weight = product.sum(0)
    mean = torch.mv(product, weight.float()).div_(x.shape[-1])[:, None]
    grad_x = (grad_output.float() * weight).addcmul_(normalised, mean, value=-1).mul_(inverse_rms)
    return grad_x.to(x.dtype), grad_weight
