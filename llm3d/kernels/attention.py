"""Causal attention over packed sequences, through PyTorch's fused kernels. Dao et al. 2022.

The setting kernels.attention chooses those of a GPU: `fa2`, the FlashAttention-2 that PyTorch brings; `fa3` or `fa4`,
of packages that PyTorch puts in its place; `cudnn`. A CPU has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llm3d.errors import InputError
from llm3d.kernels.function import Operation

# The module of the package that has it, and the compute capabilities that its kernels are for.
PACKAGES = {"fa3": ("flash_attn_interface", (9,)), "fa4": ("flash_attn.cute", (9, 10))}

_chosen = "fa2"


def use(choice: str, device: torch.device | str) -> None:
    """Choose what computes attention on a GPU from now on: kernels.attention; elsewhere there is no choice.

    Raises InputError where this GPU or PyTorch has not got it, or where it gives other bits each time in a run that is
    to be deterministic.
    """
    global _chosen
    if torch.device(device).type != "cuda":
        return
    choice = "fa2" if choice == "auto" else choice
    if choice == "cudnn" and torch.are_deterministic_algorithms_enabled():
        raise InputError("kernels.attention: cudnn is not deterministic; train.deterministic=false allows it")
    if choice in PACKAGES:
        _activate(choice, torch.cuda.get_device_capability(device))
    elif _chosen in PACKAGES:
        torch.nn.attention.restore_flash_attention_impl()
    _chosen = choice


def describe(device: torch.device | str) -> str:
    """What computes attention on a device, in a word."""
    return _chosen if torch.device(device).type == "cuda" else "PyTorch's"


def _activate(choice: str, capability: tuple[int, int]) -> None:
    """Have PyTorch's flash attention operations call the package's kernels."""
    module, capabilities = PACKAGES[choice]
    if capability[0] not in capabilities:
        supported = " or ".join(f"{major}.x" for major in capabilities)
        has = ".".join(map(str, capability))
        raise InputError(
            f"kernels.attention: {choice} is for GPUs of compute capability {supported}; this one has {has}"
        )
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None or choice.upper() not in torch.nn.attention.list_flash_attention_impls():
        raise InputError(
            f"kernels.attention: {choice} needs a newer PyTorch; {torch.__version__} does not know it"
        )
    try:
        activate(choice.upper())
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"kernels.attention: {choice} needs the module {module}, which cannot be imported: {error}"
        ) from None


def attention(qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Each token attends to itself and the tokens before it in its own sequence.

    qkv: [tokens, num_heads + 2 kv_heads, head_dim], queries, keys and values; kv_heads divides num_heads, and each
    key's and value's head serves as many queries' heads. Ainslie et al. 2023.
    cu_seqlens: int32 [sequences + 1], where each sequence starts, and the number of tokens; max_seqlen: the longest.
    -> [tokens, num_heads, head_dim]. Backward gives the gradient of qkv as one tensor, which nothing else has.
    """
    equally_long = (len(cu_seqlens) - 1) * max_seqlen == len(qkv)  # cuDNN is asked where it needs no padding
    if qkv.is_cuda and (not _flash_takes(qkv) or (_chosen == "cudnn" and equally_long)):
        return _by_sdpa(qkv, num_heads, cu_seqlens, max_seqlen)
    return AttentionFunction.of(qkv, num_heads, cu_seqlens, max_seqlen)


def _flash_takes(qkv: Tensor) -> bool:
    return qkv.dtype in (torch.bfloat16, torch.float16) and qkv.shape[2] % 8 == 0 and qkv.shape[2] <= 256


def parts(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: views."""
    kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = qkv.split([num_heads, kv_heads, kv_heads], dim=1)
    return q, k, v


class AttentionFunction(Operation):
    """Keeps qkv, the output and the rows' log-sum-exp, and computes the scores again in backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        forward = _flash if qkv.is_cuda else _on_paper if qkv.is_meta else _on_cpu
        out, *kept = forward(*parts(qkv, num_heads), cu_seqlens, max_seqlen)
        ctx.save_for_backward(qkv, cu_seqlens, out, *kept)
        ctx.num_heads, ctx.max_seqlen = num_heads, max_seqlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, cu_seqlens, out, *kept = ctx.saved_tensors
        backward = _flash_backward if qkv.is_cuda else _on_paper_backward if qkv.is_meta else _on_cpu_backward
        grad_qkv = backward(grads[0], *parts(qkv, ctx.num_heads), cu_seqlens, ctx.max_seqlen, out, kept)
        return grad_qkv, None, None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, ...]:
    """-> the output, and what backward wants: log-sum-exp and two numbers of a dropout that there is not.

    The operation under torch.nn.attention.varlen_attn, without its wrappers, which take longer than the launch.
    """
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out, log_sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, True, False, window_size_left=-1, window_size_right=0
    )
    return out, log_sums, seed, offset


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    out: Tensor,
    kept: Sequence[Tensor],
) -> Tensor:
    """Deterministic where torch.use_deterministic_algorithms asks for it."""
    lengths, (log_sums, seed, offset) = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), kept
    grads = torch.ops.aten._flash_attention_backward(
        grad,
        *(q, k, v, out, log_sums),
        *lengths,
        *(0.0, True, seed, offset),
        window_size_left=-1,
        window_size_right=0,
    )
    return torch.cat(grads, dim=1)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, ...]:
    """-> the output, and the log-sum-exp of each batch of sequences."""
    results = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_batched(x[rows], count) for x in (q, k, v)), 0.0, True
        )
        for rows, count in _batches(cu_seqlens, max_seqlen, len(q))
    ]
    outputs = [_tokens(out) for out, _ in results]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), *(log_sums for _, log_sums in results)


def _on_cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    out: Tensor,
    log_sums: Sequence[Tensor],
) -> Tensor:
    grad_qkv = q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2])
    batches = _batches(cu_seqlens, max_seqlen, len(q))
    for (rows, count), log_sum in zip(batches, log_sums, strict=True):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_batched(x[rows], count) for x in (grad, q, k, v, out)), log_sum, 0.0, True
        )
        torch.cat([_tokens(x) for x in grads], dim=1, out=grad_qkv[rows])
    return grad_qkv


def _on_paper(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, ...]:
    """Of tensors without data: what the fused kernels give and keep."""
    log_sums = q.new_empty(q.shape[:2], dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), log_sums


def _on_paper_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return torch.cat([torch.empty_like(x) for x in (q, k, v)], dim=1)


def _by_sdpa(qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """By cuDNN where it was chosen; in fp32, and of heads of other sizes, by what PyTorch finds: slow, and for tests.

    Of grouped queries in fp32 that makes all scores of a sequence.
    """
    cudnn = _chosen == "cudnn" and _flash_takes(qkv)
    outputs = []
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else nullcontext():
        for rows, count in _batches(cu_seqlens, max_seqlen, len(qkv)):
            q, k, v = (_batched(x[rows], count) for x in parts(qkv, num_heads))
            grouped = q.shape[1] != k.shape[1]
            outputs.append(_tokens(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)))
    return torch.cat(outputs)


def _batches(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> list[tuple[slice, int]]:
    """Rows, and how many sequences of one length they are: all, or each sequence by itself."""
    count = len(cu_seqlens) - 1
    if count * max_seqlen == num_tokens:
        return [(slice(0, num_tokens), count)]
    bounds = cu_seqlens.tolist()
    return [(slice(*rows), 1) for rows in pairwise(bounds)]


def _batched(x: Tensor, count: int) -> Tensor:
    """[tokens, heads, head_dim] -> [sequences, heads, length, head_dim]: a view."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """And back."""
    return x.transpose(1, 2).flatten(0, 1)
