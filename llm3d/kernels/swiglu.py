"""SwiGLU: silu(gate) * up, on the fused output of the gate and up projections. Shazeer 2020."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from llm3d.kernels.backend import fake, fused
from llm3d.kernels.function import Operation


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up: [tokens, 2 * intermediate] -> [tokens, intermediate].

    Keeps only gate_up for backward, which writes its gradient over it: nothing else may need it by then.
    """
    return _SwiGLU.of(gate_up)


class _SwiGLU(Operation):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gradient = gate_up.detach()
        swiglu_backward_(grads[0].contiguous(), gradient)
        increment_version(gradient)  # a second backward then finds that what it needs is gone
        return gradient


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """gate_up: [tokens, 2 * intermediate] -> silu(gate) * up: [tokens, intermediate]."""
    if op := fused("swiglu_forward", gate_up):
        return op(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward_(grad_out: Tensor, gate_up: Tensor) -> None:
    """Overwrite gate_up, [tokens, 2 * intermediate], by its gradient. grad_out: [tokens, intermediate]."""
    if op := fused("swiglu_backward_", gate_up):
        op(grad_out, gate_up)
        return
    gate, up = gate_up.chunk(2, dim=-1)
    grad_up = torch.nn.functional.silu(gate).mul_(grad_out)
    torch.ops.aten.silu_backward.grad_input(up.mul_(grad_out), gate, grad_input=gate)
    up.copy_(grad_up)


@fake("swiglu_forward")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@fake("swiglu_backward_")
def _(grad_out: Tensor, gate_up: Tensor) -> None:
    return None
