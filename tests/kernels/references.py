"""What PyTorch computes in place of kernels, and what both are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def targets_of(tokens: int, vocabulary: int) -> Tensor:
    """Every third target is elsewhere: before, or behind."""
    targets = torch.arange(tokens) * 7 % vocabulary
    targets[2::3] = -1
    targets[5::6] = vocabulary + 3
    return targets


RMS_NORM_EPS = 1e-5


def rms_norm_by_autograd(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As Hugging Face's LLaMA computes it: in fp32 or more, rounded before it meets the weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide * (wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS).rsqrt()).to(x.dtype) * weight
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    return y.detach(), grad_x, grad_weight


def swiglu_by_autograd(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.clone().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    out = torch.nn.functional.silu(gate) * up
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


ADAMW: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def adamw_scalars(step: int, lr: float = 0.01, scale: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    fp64 = torch.float64
    return torch.tensor(step), torch.tensor(lr, dtype=fp64), torch.tensor(scale, dtype=fp64)


def adamw_by_torch(master: Tensor, gradients: list[Tensor]) -> Tensor:
    """Torch's AdamW in the dtype of master."""
    leaf = master.clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=0.01, **ADAMW)
    for gradient in gradients:
        leaf.grad = gradient.to(leaf.dtype) * 0.25
        optimizer.step()
    return leaf.detach()
