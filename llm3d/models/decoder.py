"""A decoder-only transformer of any family, whole or one pipeline stage of it.

Activations are [tokens, hidden]: the sequences of a microbatch under each other, told apart by `cu_seqlens`.
Only attention knows about sequences. Under sequence parallelism each tensor rank holds its share of the tokens
between the sublayers.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llm3d.kernels.counter_rng import symmetric_noise
from llm3d.kernels.rope import RopeTables, inverse_frequencies
from llm3d.models.adapters import is_adapter
from llm3d.models.batch import Batch, Context, WithinSequences
from llm3d.models.family import Build, Family
from llm3d.models.heads import SCORE, HeadName, LanguageModelHead, OutputFunction, ScoreHead
from llm3d.parallel.boxes import Box, ShardedParameter
from llm3d.parallel.layers import VocabParallelEmbedding

_NOISE_STREAM = zlib.crc32(b"NEFTune")


class DecoderStage(nn.Module):
    """Layers `layers` of a decoder; the first pipeline stage has the embedding, the last the final norm and the head.

    head: "language" (token logits) or "score" (a number a token).
    The parameters have no storage until `FlatParameters` gives it to them.
    """

    def __init__(self, build: Build, family: Family, layers: range, head: HeadName = "language") -> None:
        super().__init__()
        config, mesh, sequence_parallel = build.config, build.mesh, build.sequence_parallel
        assert config.vocab_size is not None, "the vocabulary's size is known before a model is built"
        self.tensor_rank, self.token_multiple = mesh.tensor_rank, mesh.tensor_size if sequence_parallel else 1
        self.numbers = layers
        self.kv_shape = build.num_kv_heads, config.head_dim  # of a token in a layer
        table = Box.whole("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        shared = mesh.embedding if config.tie_word_embeddings and head == "language" else None
        self.embedding: VocabParallelEmbedding | None = None
        if layers.start == 0:
            self.embedding = VocabParallelEmbedding(table, mesh.tensor, sequence_parallel, partial=shared)
        self.layers = nn.ModuleDict({str(i): family.block(build, i) for i in layers})
        self.head: LanguageModelHead | ScoreHead | None = None
        if layers.stop == config.num_hidden_layers:
            self.norm = build.norm("model.norm.weight")
            if head == "score":
                score = Box.whole(SCORE, (1, config.hidden_size))
                self.head = ScoreHead(score, mesh.tensor, sequence_parallel)
            else:
                self.head = self._language_head(build, table, shared)
        if build.lora.rank:
            for parameter in self.parameters():
                assert isinstance(parameter, ShardedParameter)
                name = parameter.pieces[0].box.name
                parameter.requires_grad_(is_adapter(name) or name == SCORE)
        scaling = config.rope_scaling.model_dump() if config.rope_scaling else None
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, scaling)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)
        self.rope_tables = RopeTables()

    def _language_head(self, build: Build, table: Box, shared: ProcessGroup | None) -> LanguageModelHead:
        tied, recompute = None, build.recompute == "full"
        if not build.config.tie_word_embeddings:
            table = Box.whole("lm_head.weight", table.shape)
        elif self.embedding is not None:
            tied = self.embedding.weight
        return LanguageModelHead(table, build.mesh.tensor, build.sequence_parallel, tied, shared, recompute)

    def forward(self, hidden: Tensor | None, batch: Batch, objective: OutputFunction) -> Tensor:
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
        return self.through_layers(hidden, Context(*tables, batch.positions, attend, batch.keys))

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
