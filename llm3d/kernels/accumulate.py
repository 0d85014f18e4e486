"""Adding a gradient to its sum in fp32."""

from __future__ import annotations

from torch import Tensor

from llm3d.kernels.backend import fake, fused


def accumulate_(total: Tensor, x: Tensor) -> None:
    """total += x. total: fp32; x: of the same shape, fp32, bf16 or fp16; both contiguous."""
    if op := fused("accumulate_", x):  # on a CPU; on a GPU PyTorch's own addition of two dtypes is one pass
        op(total, x)
    else:
        total.add_(x)


@fake("accumulate_")
def _(total: Tensor, x: Tensor) -> None:
    return None
