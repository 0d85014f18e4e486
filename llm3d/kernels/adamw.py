"""AdamW over a flat range of parameters, in one pass over memory. Loshchilov and Hutter 2019."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from llm3d.kernels.backend import fake, fused


def adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    parameter: Tensor | None,
    step: Tensor,
    lr: Tensor,
    gradient_scale: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int = 0,
    offset: int = 0,
) -> None:
    """Step number `step` (from 1) of master, exp_avg and exp_avg_sq, in place; parameter becomes master, rounded.

    master: fp32 [n]. exp_avg, exp_avg_sq: [n], fp32, or bf16 with stochastic rounding. gradient: [n], fp32, bf16 or
    fp16; it is multiplied by gradient_scale on the way (unscaling and clipping) and not changed; where gradient_scale
    is not finite nothing is. parameter: [n], bf16 or fp16, or None.
    step: int64, lr and gradient_scale: fp64, one element each on master's device, where they are read: a CUDA graph
    of the step stays valid. Weight decay is decoupled: master *= 1 - lr * weight_decay.
    The random bits of stochastic rounding are a function of seed, step and the element's number, from `offset` on.
    """
    if op := fused("adamw_", master):
        tensors = (master, exp_avg, exp_avg_sq, gradient, parameter, step, lr, gradient_scale)
        op(*tensors, *betas, eps, weight_decay, seed, offset)
        return
    if not torch.isfinite(gradient_scale):
        return
    moments = [exp_avg.float(), exp_avg_sq.float()]  # the same tensors where they are fp32
    adamw(
        [master],
        [gradient.float() * gradient_scale.float()],
        moments[:1],
        moments[1:],
        max_exp_avg_sqs=[],
        state_steps=[step.to(torch.float32) - 1],
        foreach=False,
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=float(lr),
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    if exp_avg.dtype == torch.bfloat16:
        index = torch.arange(offset, offset + len(master), device=master.device)
        bits = _random_bits(seed, int(step), index)
        exp_avg.copy_(_round_stochastically(moments[0], bits & 0xFFFF))
        exp_avg_sq.copy_(_round_stochastically(moments[1], bits >> 16))
    if parameter is not None:
        parameter.copy_(master)


_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def _random_bits(seed: int, step: int, index: Tensor) -> Tensor:
    """32 bits in int64 for each index: the hash of csrc/adamw/math.h, Wellons' lowbias32 over seed, step and index."""
    mixed = (seed * 0x9E3779B97F4A7C15 & _MASK64) ^ (step * 0xD1342543DE82EF95 & _MASK64)
    x = (index & _MASK32) ^ ((index >> 32) * 0x85EBCA6B & _MASK32) ^ ((mixed ^ (mixed >> 32)) & _MASK32)
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * (0x846CA68B - 2**32) & _MASK32  # the product of two 32-bit numbers would pass 2^63
    return x ^ (x >> 16)


def _round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16: 16 random bits are added below the last place, then the rest is cut off."""
    words = x.view(torch.int32)
    special = ~torch.isfinite(x)
    rounded = (words + bits.to(torch.int32).masked_fill(special, 0)) & ~0xFFFF
    return rounded.view(torch.float32).bfloat16()


@fake("adamw_")
def _(*args: object) -> None:
    return None
