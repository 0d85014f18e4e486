"""A key-value cache in blocks, and attention of each sequence's newest token to it. Kwon et al. 2023.

A cache is [blocks, block_size, kv_heads, head_dim], one for the keys and one for the values. A token lies in slot
block * block_size + offset; the tokens of a sequence lie in the blocks that its row of the block table names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm3d.kernels.backend import fake, fused


def kv_cache_append_(key_cache: Tensor, value_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store the keys and values of tokens in their slots.

    key_cache, value_cache: contiguous. k, v: [tokens, kv_heads, head_dim], of any strides but a last of 1.
    slots: int64 [tokens], no two alike; a token with a negative slot is not stored. A slot beyond the cache is an
    error on a CPU; on a GPU, where an error would have to wait for the device, such a token is not stored.
    """
    if op := fused("kv_cache_append_", key_cache):
        op(key_cache, value_cache, k, v, slots)
        return
    stored = slots >= 0
    key_cache.flatten(0, 1)[slots[stored]] = k[stored]
    value_cache.flatten(0, 1)[slots[stored]] = v[stored]


def paged_decode_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """softmax(scale * q k) v over the tokens of each sequence that are in the cache.

    q: [sequences, heads, head_dim], of any strides but a last of 1; query head h reads key-value head
    h / (heads / kv_heads). block_table: int32 [sequences, max_blocks], entries beyond a sequence's tokens are not
    looked at; lengths: int32 [sequences], tokens attended to; of none, the result is 0.
    -> [sequences, heads, head_dim], by a softmax in fp32. The native CPU kernel raises where the table names a block
    that the cache lacks, or is too short for a length; elsewhere that must not be.
    """
    if op := fused("paged_decode_attention", q):
        return op(q, key_cache, value_cache, block_table, lengths, scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    used = torch.arange(block_table.shape[1] * key_cache.shape[1], device=q.device) < lengths[:, None]
    k, v = (_contexts(cache, block_table, used).to(dtype) for cache in (key_cache, value_cache))
    mask = used[:, None, None]
    out = F.scaled_dot_product_attention(
        q[:, :, None].to(dtype), k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[:, :, 0].masked_fill(lengths[:, None, None] == 0, 0.0).to(q.dtype)


def _contexts(cache: Tensor, block_table: Tensor, used: Tensor) -> Tensor:
    """[sequences, kv_heads, context, head_dim]: each sequence's part of the cache; where it is not used, 0."""
    blocks = block_table.clamp(0, len(cache) - 1)
    return cache[blocks].flatten(1, 2).masked_fill_(~used[:, :, None, None], 0.0).transpose(1, 2)


@fake("kv_cache_append_")
def _(key_cache: Tensor, value_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    return None


@fake("paged_decode_attention")
def _(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape)
