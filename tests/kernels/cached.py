"""Sequences whose keys and values lie in a paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm3d.kernels.paged_attention import kv_cache_append_, paged_decode_attention
from tests.kernels.exactness import randn


@dataclass
class Sequences:
    """Tokens of some sequences, in a cache whose blocks are shuffled and whose unused memory is NaN."""

    q: Tensor  # [sequences, heads, head_dim]
    k: list[Tensor]  # of each sequence: [length, kv_heads, head_dim]
    v: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    lengths: Tensor

    def decode(self) -> Tensor:
        tables = self.block_table, self.lengths
        return paged_decode_attention(self.q, self.key_cache, self.value_cache, *tables, self.scale)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def dense(self, dtype: torch.dtype) -> Tensor:
        """By PyTorch, a sequence at a time, computed in dtype."""
        return torch.stack(
            [dense_attention(*(x.to(dtype) for x in one)) for one in zip(self.q, self.k, self.v, strict=True)]
        )


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [heads, head_dim], k, v: [tokens, kv_heads, head_dim] -> [heads, head_dim]; of no tokens, 0."""
    k, v = (x.repeat_interleave(len(q) // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("hd,thd->ht", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def block_tables(lengths: list[int], block_size: int, spare: int = 2) -> tuple[Tensor, int]:
    """Tables that give each sequence its blocks, in a shuffled order; unused entries are -1. And the blocks in all."""
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + spare, generator=torch.Generator().manual_seed(3)).int()
    table = torch.full((len(lengths), max(counts, default=0) + spare), -1, dtype=torch.int32)
    for row, blocks in zip(table, order[: sum(counts)].split(counts), strict=True):
        row[: len(blocks)] = blocks
    return table, len(order)


def slots_of(table_row: Tensor, length: int, block_size: int) -> Tensor:
    token = torch.arange(length)
    return table_row.long()[token // block_size] * block_size + token % block_size


def sequences(
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 8,
    block_size: int = 3,
    scale: float = 1.0,
) -> Sequences:
    table, blocks = block_tables(lengths, block_size)
    caches = [torch.full((blocks, block_size, heads[1], head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    k = [randn(length, heads[1], head_dim, seed=i).to(dtype) for i, length in enumerate(lengths)]
    v = [randn(length, heads[1], head_dim, seed=i + 50).to(dtype) for i, length in enumerate(lengths)]
    for i, length in enumerate(lengths):
        kv_cache_append_(*caches, k[i], v[i], slots_of(table[i], length, block_size))
    q = randn(len(lengths), heads[0], head_dim, seed=99, scale=scale).to(dtype)
    return Sequences(q, k, v, *caches, table, torch.tensor(lengths, dtype=torch.int32))
