"""A LLaMA transformer, whole or one pipeline stage of it. Touvron et al. 2023; Grattafiori et al. 2024 (Llama 3).

Activations are [tokens, hidden]: the sequences of a microbatch under each other, told apart by `cu_seqlens`.
Only attention knows about sequences. Under sequence parallelism each tensor rank holds its share of the tokens
between the sublayers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from llm3d.config import LoRASettings, ModelConfig
from llm3d.kernels.attention import attention
from llm3d.kernels.counter_rng import symmetric_noise
from llm3d.kernels.rope import RopeTables, inverse_frequencies, rope
from llm3d.kernels.swiglu import swiglu, swiglu_forward
from llm3d.models.adapters import column_adapters, is_adapter, row_adapters
from llm3d.models.batch import Batch
from llm3d.models.heads import SCORE, HeadName, LanguageModelHead, Objective, ScoreHead
from llm3d.parallel.boxes import Box, Piece, ShardedParameter, stack
from llm3d.parallel.layers import (
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    Source,
    VocabParallelEmbedding,
    split_evenly,
)
from llm3d.parallel.mesh import Mesh

T = TypeVar("T")

_NOISE_STREAM = zlib.crc32(b"NEFTune")


class Attend(Protocol):
    """What each token sees of which others."""

    def __call__(self, layer: int, qkv: Tensor, num_heads: int) -> Tensor:
        """qkv: [tokens, num_heads + 2 kv_heads, head_dim] -> [tokens, num_heads, head_dim].

        layer: of the whole model.
        """


@dataclass(frozen=True)
class WithinSequences:
    """Itself and the tokens before it in its own sequence."""

    cu_seqlens: Tensor  # int32 [sequences + 1]
    max_seqlen: int

    def __call__(self, layer: int, qkv: Tensor, num_heads: int) -> Tensor:
        return attention(qkv, num_heads, self.cu_seqlens, self.max_seqlen)


class Context(NamedTuple):
    """What attention needs beside the activations; the same for every layer."""

    cos: Tensor  # fp32 [positions, head_dim / 2]
    sin: Tensor
    starts: Tensor  # int32 [n + 1]: where positions start from 0 again, and the number of tokens
    attend: Attend
    keys: Tensor | None = None  # int64 [tokens], of the tokens' random numbers; None: nothing is random


class LlamaStage(nn.Module):
    """Layers `layers` of a LLaMA; the first stage has the embedding, the last the final norm and the head.

    head: "language" (token logits) or "score" (a number a token).
    lora: with a rank, only adapters and a score head are trained.
    sequence_parallel: split the tokens over the tensor group between sublayers.
    recompute: "none"; "selective" keeps neither norms nor SwiGLU's output for backward, and makes them again there of
        what they were made of, without a matrix product; "full" keeps only the input of each layer, and no logits.
    The parameters have no storage until `FlatParameters` gives it to them.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        layers: range,
        *,
        sequence_parallel: bool = False,
        recompute: str = "none",
        head: HeadName = "language",
        lora: LoRASettings | None = None,
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary's size is known before a model is built"
        self.config, self.tensor_rank, lora = config, mesh.tensor_rank, lora or LoRASettings()
        self.tokens_a_row = mesh.tensor_size if sequence_parallel else 1
        self.numbers = layers
        self.kv_shape = key_value_heads(config, mesh), config.head_dim  # of a token in a layer
        table = Box.whole("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        shared = mesh.embedding if config.tie_word_embeddings and head == "language" else None
        self.embedding: VocabParallelEmbedding | None = None
        if layers.start == 0:
            self.embedding = VocabParallelEmbedding(table, mesh.tensor, sequence_parallel, partial=shared)
        kv_replicas = key_value_replicas(config, mesh)
        self.layers = nn.ModuleDict(
            {
                str(i): LlamaLayer(config, mesh, i, kv_replicas, sequence_parallel, recompute, lora)
                for i in layers
            }
        )
        self.head: LanguageModelHead | ScoreHead | None = None
        if layers.stop == config.num_hidden_layers:
            self.norm = _norm("model.norm.weight", config, mesh, sequence_parallel)
            if head == "score":
                score = Box.whole(SCORE, (1, config.hidden_size))
                self.head = ScoreHead(score, mesh.tensor, sequence_parallel)
            else:
                self.head = self._language_head(table, mesh, sequence_parallel, shared, recompute == "full")
        if lora.rank:
            for parameter in self.parameters():
                assert isinstance(parameter, ShardedParameter)
                name = parameter.pieces[0].box.name
                parameter.requires_grad_(is_adapter(name) or name == SCORE)
        scaling = config.rope_scaling.model_dump() if config.rope_scaling else None
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, scaling)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)
        self.rope_tables = RopeTables()

    def _language_head(
        self,
        table: Box,
        mesh: Mesh,
        sequence_parallel: bool,
        shared: ProcessGroup | None,
        recompute: bool,
    ) -> LanguageModelHead:
        tied = None
        if not self.config.tie_word_embeddings:
            table = Box.whole("lm_head.weight", table.shape)
        elif self.embedding is not None:
            tied = self.embedding.weight
        return LanguageModelHead(table, mesh.tensor, sequence_parallel, tied, shared, recompute)

    def forward(self, hidden: Tensor | None, batch: Batch, objective: Objective) -> Tensor:
        """hidden: None on the first stage, else the stage before's output.

        -> [tokens, hidden_size] ([tokens / n, hidden_size] under sequence parallelism); from the last stage the
        objective's numbers.
        """
        hidden = self.transform(hidden, batch)
        return hidden if self.head is None else self.head(hidden, batch, objective)

    def units(self) -> list[nn.Module]:
        """The modules whose parameters are stored and gathered together, in the order of their calls."""
        ends = [self.norm, self.head] if self.head is not None else []
        return [*([self.embedding] if self.embedding is not None else []), *self.layers.values(), *ends]

    def transform(self, hidden: Tensor | None, batch: Batch) -> Tensor:
        """Everything but the head: the embedding, the layers and the final norm that this stage has."""
        if self.embedding is not None:
            hidden = self._with_noise(self.embedding(batch.tokens), batch)
            if torch.is_grad_enabled():
                hidden.requires_grad_()  # under a frozen embedding, too, backward passes the layers to their ends
        assert hidden is not None, "stages after the first get an input"
        assert isinstance(self.rope_frequencies, Tensor)
        tables = self.rope_tables(batch.max_seqlen, self.rope_frequencies)
        attend = WithinSequences(batch.cu_seqlens, batch.max_seqlen)
        return self.through_layers(hidden, Context(*tables, batch.cu_seqlens, attend, batch.keys))

    def through_layers(self, hidden: Tensor, context: Context) -> Tensor:
        """The layers, and the final norm where this stage has it. hidden: the whole residual stream."""
        x, residual = hidden, None
        for layer in self.layers.values():
            x, residual = layer(x, residual, context)
        if self.head is not None:
            return self.norm(x, residual)[0]
        return x if residual is None else x + residual

    def _with_noise(self, hidden: Tensor, batch: Batch) -> Tensor:
        """NEFTune: uniform noise, up to batch.noise for each token. Jain et al. 2023."""
        if batch.noise is None or batch.keys is None:
            return hidden
        first = 0 if len(hidden) == len(batch.tokens) else self.tensor_rank * len(hidden)
        mine = slice(first, first + len(hidden))
        noise = symmetric_noise(batch.keys[mine], _NOISE_STREAM, hidden.shape[1])
        return hidden + (noise * batch.noise[mine, None]).to(hidden.dtype)


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), whose sum is left to the next layer's norm."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        index: int,
        kv_replicas: ProcessGroup | None,
        sequence_parallel: bool,
        recompute: str,
        lora: LoRASettings,
    ) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.attention_norm = _norm(f"{prefix}.input_layernorm.weight", config, mesh, sequence_parallel)
        self.attention = Attention(config, mesh, index, kv_replicas, sequence_parallel, lora)
        self.mlp_norm = _norm(f"{prefix}.post_attention_layernorm.weight", config, mesh, sequence_parallel)
        self.mlp = MLP(config, mesh, f"{prefix}.mlp", sequence_parallel, lora)
        self.recompute = recompute

    def forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """x: what the layer before adds to the residual stream, [tokens, hidden], is overwritten -> the same two.

        residual: None, where x is the whole stream.
        """
        if self.recompute == "full" and torch.is_grad_enabled():
            # What is kept is the sum, made here: were it made in the norm, it would be x, and made twice.
            return recomputed(self._forward)(x if residual is None else x + residual, None, context)
        return self._forward(x, residual, context)

    def _forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        normalised, hidden = self.attention_norm(x, residual)
        attended = self.attention(normalised, context, self._source(self.attention_norm, hidden))
        normalised, hidden = self.mlp_norm(attended, hidden)
        return self.mlp(normalised, context, self._source(self.mlp_norm, hidden)), hidden

    def _source(self, norm: RMSNorm, hidden: Tensor) -> Source | None:
        return Source(norm.again, (hidden,)) if self.recompute == "selective" else None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; heads spread over the tensor group. Ainslie et al. 2023."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        layer: int,
        kv_replicas: ProcessGroup | None,
        sequence_parallel: bool,
        lora: LoRASettings,
    ) -> None:
        super().__init__()
        self.layer, prefix = layer, f"model.layers.{layer}.self_attn"
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // mesh.tensor_size
        self.num_kv_heads = key_value_heads(config, mesh)
        pieces = _qkv_pieces(config, mesh, prefix, kv_replicas)
        self.qkv = _column_parallel(pieces, mesh, sequence_parallel, lora)
        output = Box.whole(
            f"{prefix}.o_proj.weight", (config.hidden_size, config.num_attention_heads * self.head_dim)
        )
        self.output = _row_parallel(output, mesh, sequence_parallel, lora)

    def forward(self, x: Tensor, context: Context, source: Source | None) -> Tensor:
        """source: of x, where it is not kept."""
        rotated = self.num_heads + self.num_kv_heads
        qkv = rope(
            self.qkv(x, context.keys, source),
            self.head_dim,
            context.cos,
            context.sin,
            context.starts,
            rotated,
        )
        heads = context.attend(self.layer, qkv.unflatten(1, (-1, self.head_dim)), self.num_heads)
        return self.output(heads.flatten(1), context.keys)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); the intermediate dimension is spread over the tensor group."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, prefix: str, sequence_parallel: bool, lora: LoRASettings
    ) -> None:
        super().__init__()
        part = split_evenly(config.intermediate_size, mesh.tensor)
        pieces = [
            Piece(
                Box.whole(f"{prefix}.{name}.weight", (config.intermediate_size, config.hidden_size)).rows(
                    part.start, len(part)
                )
            )
            for name in ("gate_proj", "up_proj")
        ]
        self.gate_up = _column_parallel(stack(pieces), mesh, sequence_parallel, lora)
        down = Box.whole(f"{prefix}.down_proj.weight", (config.hidden_size, config.intermediate_size))
        self.down = _row_parallel(down, mesh, sequence_parallel, lora)

    def forward(self, x: Tensor, context: Context, source: Source | None) -> Tensor:
        """source: of x, where it is not kept; then SwiGLU's output is not, either."""
        gate_up = self.gate_up(x, context.keys, source)
        return self.down(swiglu(gate_up), context.keys, source and Source(swiglu_forward, (gate_up,)))


def _column_parallel(
    pieces: Sequence[Piece], mesh: Mesh, sequence_parallel: bool, lora: LoRASettings
) -> ColumnParallelLinear:
    adapters = column_adapters(pieces, lora, mesh.tensor)
    return ColumnParallelLinear(pieces, mesh.tensor, sequence_parallel, adapters)


def _row_parallel(box: Box, mesh: Mesh, sequence_parallel: bool, lora: LoRASettings) -> RowParallelLinear:
    columns = split_evenly(box.size[1], mesh.tensor)
    piece = Piece(box.columns(columns.start, len(columns)))
    return RowParallelLinear(piece, mesh.tensor, sequence_parallel, row_adapters(piece, lora, mesh.tensor))


def recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """The function, with its inner activations computed again in backward instead of kept. Chen et al. 2016."""

    def run(*args: Any) -> T:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def key_value_heads(config: ModelConfig, mesh: Mesh) -> int:
    """On each tensor rank."""
    return max(1, config.num_key_value_heads // mesh.tensor_size)


def key_value_replicas(config: ModelConfig, mesh: Mesh) -> ProcessGroup | None:
    """The tensor ranks that hold the same key/value head as this one, where there are fewer heads than ranks."""
    if mesh.tensor_size <= config.num_key_value_heads:
        return None
    return mesh.tensor_blocks(mesh.tensor_size // config.num_key_value_heads)


def _qkv_pieces(
    config: ModelConfig, mesh: Mesh, prefix: str, kv_replicas: ProcessGroup | None
) -> tuple[Piece, ...]:
    """This rank's query rows, key rows and value rows, under each other."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = Box.whole(f"{prefix}.q_proj.weight", (heads * head_dim, config.hidden_size))
    queries = split_evenly(heads * head_dim, mesh.tensor)
    pieces = [Piece(q.rows(queries.start, len(queries)))]
    count = key_value_heads(config, mesh)
    first = mesh.tensor_rank * kv_heads // mesh.tensor_size
    owned = kv_replicas is None or kv_replicas.rank() == 0
    for name in ("k_proj", "v_proj"):
        box = Box.whole(f"{prefix}.{name}.weight", (kv_heads * head_dim, config.hidden_size))
        pieces.append(Piece(box.rows(first * head_dim, count * head_dim), owned=owned, partial=kv_replicas))
    return stack(pieces)


def _norm(name: str, config: ModelConfig, mesh: Mesh, sequence_parallel: bool) -> RMSNorm:
    box = Box.whole(name, (config.hidden_size,))
    return RMSNorm(box, config.rms_norm_eps, mesh.tensor, sequence_parallel)
