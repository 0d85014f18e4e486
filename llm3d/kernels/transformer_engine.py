"""NVIDIA's transformer-engine behind our faces, where it offers the operation: RMSNorm and SwiGLU.

It rounds the weight's gradient to the weight's dtype, once a microbatch; ours stays in fp32. Its SwiGLU backward
writes beside its input, so that the gradient is copied. Its RoPE wants other tables; its Adam, another state.
"""

from __future__ import annotations

import transformer_engine.pytorch  # noqa: F401 -- loads the next
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, inverse_rms = tex.rmsnorm_fwd(x, weight, eps, None, None, TE_DType[x.dtype], 0, False)
    return y, inverse_rms[:, None]


def rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    statistics = inverse_rms[:, 0]
    if grad_sum is None:
        grad_x, grad_weight = tex.rmsnorm_bwd(grad_y, x, statistics, weight, 0, False)
    else:
        grad_x, grad_weight = tex.rmsnorm_bwd_add(grad_y, x, grad_sum, statistics, weight, 0, False)
    return grad_x, grad_weight.float()


def swiglu_forward(gate_up: Tensor) -> Tensor:
    return tex.swiglu(gate_up, None)


def swiglu_backward_(grad_out: Tensor, gate_up: Tensor) -> None:
    gate_up.copy_(tex.dswiglu(grad_out, gate_up, None))
