"""NVIDIA's apex behind our faces, where it offers the operation: RMSNorm.

It rounds the weight's gradient to the weight's dtype, once a microbatch; ours stays in fp32. Its Adam takes no fp32
gradients of bf16 parameters.
"""

from __future__ import annotations

import fused_layer_norm_cuda
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, inverse_rms = fused_layer_norm_cuda.rms_forward_affine(x.contiguous(), weight.shape, weight, eps)
    return y, inverse_rms[:, None]


def rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    eps_of_outputs, from_outputs = 0.0, False  # only read where y was kept instead of x
    grad_x, grad_weight = fused_layer_norm_cuda.rms_backward_affine(
        grad_y.contiguous(),
        inverse_rms[:, 0].contiguous(),
        x.contiguous(),
        weight.shape,
        weight,
        eps_of_outputs,
        from_outputs,
    )
    return grad_x if grad_sum is None else grad_x.add_(grad_sum), grad_weight.float()
