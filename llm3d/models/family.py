"""What the layers of any model are built from, and what a family of models adds to a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from llm3d.config import LoRASettings, ModelConfig
from llm3d.models.adapters import column_adapters, row_adapters
from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.layers import ColumnParallelLinear, RMSNorm, RowParallelLinear, split_evenly
from llm3d.parallel.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Build:
    """A model's settings and layout, and the layers that are made of them.

    sequence_parallel: split the tokens over the tensor group between sublayers.
    recompute: "none"; "selective" keeps neither norms nor what activation functions give for backward, and makes them
        again there of what they were made of, without a matrix product; "full" keeps only the input of each layer, and
        no logits.
    lora: with a rank, only adapters and a score head are trained.
    kv_replicas: see `key_value_replicas`.
    """

    config: ModelConfig
    mesh: Mesh
    sequence_parallel: bool
    recompute: str
    lora: LoRASettings
    kv_replicas: ProcessGroup | None

    @property
    def num_heads(self) -> int:
        """Query heads on each tensor rank."""
        return self.config.num_attention_heads // self.mesh.tensor_size

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads on each tensor rank."""
        return max(1, self.config.num_key_value_heads // self.mesh.tensor_size)

    def norm(self, name: str) -> RMSNorm:
        """name: of the weight, [hidden_size]."""
        box = Box.whole(name, (self.config.hidden_size,))
        return RMSNorm(box, self.config.rms_norm_eps, self.mesh.tensor, self.sequence_parallel)

    def head_norm(self, name: str) -> RMSNorm:
        """An RMSNorm of single heads, each [head_dim], which share its weight. A tensor rank has some of them."""
        box = Box.whole(name, (self.config.head_dim,))
        return RMSNorm(box, self.config.rms_norm_eps, self.mesh.tensor, partial=True)

    def column_parallel(self, pieces: Sequence[Piece], bias: bool = False) -> ColumnParallelLinear:
        """pieces: this rank's rows of one or several projections, under each other."""
        adapters = column_adapters(pieces, self.lora, self.mesh.tensor)
        return ColumnParallelLinear(pieces, self.mesh.tensor, self.sequence_parallel, adapters, bias)

    def row_parallel(self, box: Box, bias: bool = False) -> RowParallelLinear:
        """box: the whole projection; this rank has its part of the columns."""
        columns = split_evenly(box.size[1], self.mesh.tensor)
        piece = Piece(box.columns(columns.start, len(columns)))
        adapters = row_adapters(piece, self.lora, self.mesh.tensor)
        return RowParallelLinear(piece, self.mesh.tensor, self.sequence_parallel, adapters, bias)


@dataclass(frozen=True)
class Family:
    """A family of models: what a decoder takes of it.

    block: makes layer `index`, a module called with (x, residual, context): what the layer before adds to the residual
        stream, [tokens, hidden], and the stream, or the stream and None. It may overwrite x, and returns the same two.
    initial_std: of the first weights of the matrix with a name.
    """

    block: Callable[[Build, int], nn.Module]
    initial_std: Callable[[str, ModelConfig], float]


def key_value_replicas(config: ModelConfig, mesh: Mesh) -> ProcessGroup | None:
    """The tensor ranks that hold the same key/value head as this one, where there are fewer heads than ranks.

    Called by all ranks.
    """
    if mesh.tensor_size <= config.num_key_value_heads:
        return None
    return mesh.tensor_blocks(mesh.tensor_size // config.num_key_value_heads)


def recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """The function, with its inner activations computed again in backward instead of kept. Chen et al. 2016."""

    def run(*args: Any) -> T:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run
