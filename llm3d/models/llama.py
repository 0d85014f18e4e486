"""The layers of a LLaMA. Touvron et al. 2023; Grattafiori et al. 2024 (Llama 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llm3d.config import ModelConfig
from llm3d.kernels.rope import rope
from llm3d.kernels.swiglu import swiglu, swiglu_forward
from llm3d.models.batch import Context
from llm3d.models.family import Build, Family, recomputed
from llm3d.parallel.boxes import Box, Piece, stack
from llm3d.parallel.layers import RMSNorm, Source, split_evenly


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), whose sum is left to the next layer's norm."""

    def __init__(self, build: Build, index: int) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.attention_norm = build.norm(f"{prefix}.input_layernorm.weight")
        self.attention = self.make_attention(build, index)
        self.mlp_norm = build.norm(f"{prefix}.post_attention_layernorm.weight")
        self.mlp = MLP(build, f"{prefix}.mlp")
        self.recompute = build.recompute

    def make_attention(self, build: Build, index: int) -> Attention:
        return Attention(build, index)

    def forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """x: what the layer before adds to the residual stream, [tokens, hidden], is overwritten -> the same two.

        residual: None, where x is the whole stream.
        """
        if self.recompute == "full" and torch.is_grad_enabled():
            # What is kept is the sum, made here: were it made in the norm, it would be x, and made twice.
            return recomputed(self._forward)(x if residual is None else x + residual, None, context)
        return self._forward(x, residual, context)

    def _forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        normalized, hidden = self.attention_norm(x, residual)
        attended = self.attention(normalized, context, self._source(self.attention_norm, hidden))
        normalized, hidden = self.mlp_norm(attended, hidden)
        return self.mlp(normalized, context, self._source(self.mlp_norm, hidden)), hidden

    def _source(self, norm: RMSNorm, hidden: Tensor) -> Source | None:
        return Source(norm.again, (hidden,)) if self.recompute == "selective" else None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; heads spread over the tensor group. Ainslie et al. 2023."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        config, prefix = build.config, f"model.layers.{layer}.self_attn"
        self.layer, self.head_dim = layer, config.head_dim
        self.num_heads, self.num_kv_heads = build.num_heads, build.num_kv_heads
        self.qkv = build.column_parallel(_qkv_pieces(build, prefix))
        columns = config.num_attention_heads * self.head_dim
        self.output = build.row_parallel(Box.whole(f"{prefix}.o_proj.weight", (config.hidden_size, columns)))

    def forward(self, x: Tensor, context: Context, source: Source | None) -> Tensor:
        """source: of x, where it is not kept."""
        rotated = self.num_heads + self.num_kv_heads
        qkv = rope(
            self.prepared(self.qkv(x, context.keys, source)),
            self.head_dim,
            context.cos,
            context.sin,
            context.positions,
            rotated,
        )
        heads = context.attend(self.layer, qkv.unflatten(1, (-1, self.head_dim)), self.num_heads)
        return self.output(heads.flatten(1), context.keys)

    def prepared(self, qkv: Tensor) -> Tensor:
        """What is done to queries, keys and values, [tokens, heads * head_dim], before they are rotated."""
        return qkv


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); the intermediate dimension is spread over the tensor group."""

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__()
        hidden, inner = build.config.hidden_size, build.config.intermediate_size
        part = split_evenly(inner, build.mesh.tensor)
        gate, up = (
            Piece(Box.whole(f"{prefix}.{name}.weight", (inner, hidden)).rows(part.start, len(part)))
            for name in ("gate_proj", "up_proj")
        )
        self.gate_up = build.column_parallel(stack([gate, up]))
        self.down = build.row_parallel(Box.whole(f"{prefix}.down_proj.weight", (hidden, inner)))

    def forward(self, x: Tensor, context: Context, source: Source | None) -> Tensor:
        """source: of x, where it is not kept; then SwiGLU's output is not, either."""
        gate_up = self.gate_up(x, context.keys, source)
        return self.down(swiglu(gate_up), context.keys, source and Source(swiglu_forward, (gate_up,)))


def _qkv_pieces(build: Build, prefix: str) -> tuple[Piece, ...]:
    """This rank's query rows, key rows and value rows, under each other."""
    config, mesh, replicas = build.config, build.mesh, build.kv_replicas
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = Box.whole(f"{prefix}.q_proj.weight", (heads * head_dim, config.hidden_size))
    queries = split_evenly(heads * head_dim, mesh.tensor)
    pieces = [Piece(q.rows(queries.start, len(queries)))]
    first = mesh.tensor_rank * kv_heads // mesh.tensor_size
    owned = replicas is None or replicas.rank() == 0
    for name in ("k_proj", "v_proj"):
        box = Box.whole(f"{prefix}.{name}.weight", (kv_heads * head_dim, config.hidden_size))
        rows = box.rows(first * head_dim, build.num_kv_heads * head_dim)
        pieces.append(Piece(rows, owned=owned, partial=replicas))
    return stack(pieces)


def initial_std(name: str, config: ModelConfig) -> float:
    """initializer_range; for the projections that write into the residual stream divided by sqrt(2 * layers), as in
    GPT-2 and Megatron-LM.
    """
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range


LLAMA = Family(block=LlamaBlock, initial_std=initial_std)
