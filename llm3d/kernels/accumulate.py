"""Adding a gradient to its sum."""

from __future__ import annotations

import torch
from torch import Tensor

from llm3d.kernels.backend import fake, fused


def accumulate_(total: Tensor, x: Tensor) -> None:
    """total += x. total: fp32, bf16 or fp16; x: of the same shape, fp32, bf16 or fp16; both contiguous."""
    if total.dtype == torch.float32 and (op := fused("accumulate_", x)):
        # On a CPU; on a GPU PyTorch's own addition of two dtypes is one pass.
        op(total, x)
    else:
        total.add_(x)


@fake("accumulate_")
def _(total: Tensor, x: Tensor) -> None:
    return None
