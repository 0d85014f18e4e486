"""How torch's own CUDA kernels compute: whether the same run gives the same bits, and what products are summed in."""

from __future__ import annotations

import os

import torch


def use_numerics(device: torch.device, deterministic: bool) -> None:
    """Choose for the process, before its first matrix product on a GPU. A CPU is deterministic as it is.

    deterministic: an operation that has no kernel which adds up in a fixed order raises RuntimeError.
    """
    if device.type != "cuda":
        return
    if deterministic:
        # With a workspace of its own for each stream, cuBLAS splits products alike each time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Where cuBLAS splits a long sum among blocks, it would add their parts up in the narrow type of the operands, and
    # round once more for each.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
