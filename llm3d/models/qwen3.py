"""The layers of a Qwen3 (dense): LLaMA's, with an RMSNorm on each query and key head. Yang et al. 2025."""

from __future__ import annotations

import torch
from torch import Tensor

from llm3d.models.family import Build, Family
from llm3d.models.llama import Attention, LlamaBlock, initial_std


class Qwen3Attention(Attention):
    """LLaMA's, with queries and keys normalized before they are rotated."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        prefix = f"model.layers.{layer}.self_attn"
        self.query_norm = build.head_norm(f"{prefix}.q_norm.weight")
        self.key_norm = build.head_norm(f"{prefix}.k_norm.weight")

    def prepared(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.split([n * self.head_dim for n in (self.num_heads, *[self.num_kv_heads] * 2)], dim=1)
        q, k = (
            norm(heads.reshape(-1, self.head_dim))[0].view_as(heads)
            for norm, heads in ((self.query_norm, q), (self.key_norm, k))
        )
        return torch.cat([q, k, v], dim=1)


class Qwen3Block(LlamaBlock):
    """LLaMA's, with Qwen3's attention."""

    def make_attention(self, build: Build, index: int) -> Attention:
        return Qwen3Attention(build, index)


QWEN3 = Family(block=Qwen3Block, initial_std=initial_std)
