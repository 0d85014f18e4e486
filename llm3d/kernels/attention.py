"""Causal attention over packed sequences, through PyTorch's fused kernels. Dao et al. 2022."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Each token attends to itself and the tokens before it in its own sequence.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim], kv_heads divides heads.
    cu_seqlens: int32 [sequences + 1], where each sequence starts, and the number of tokens; max_seqlen: the longest.
    -> [tokens, heads, head_dim]
    """
    if q.is_meta:
        return _OnPaper.apply(q, k, v)
    if q.is_cuda and q.dtype != torch.float32 and q.shape[2] % 8 == 0 and q.shape[2] <= 256:
        return _varlen(q, k, v, cu_seqlens, max_seqlen)
    sequences = len(cu_seqlens) - 1
    if sequences * max_seqlen == len(q):  # all of one length
        return _batched(q, k, v, sequences)
    lengths = cu_seqlens.diff().tolist()
    outputs = [
        _batched(*parts, 1)
        for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(outputs)


def _batched(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    """Sequences of one length through SDPA, which wants [sequences, heads, length, head_dim]."""
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    # torch 2.10 takes is_causal, 2.11 and later a window.
    old = "is_causal" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if old else {"window_size": (-1, 0)}
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **causal)
    assert isinstance(out, Tensor)
    return out


class _OnPaper(Function):
    """Attention of tensors without data, which keeps what the fused kernels keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
