"""A microbatch as models read it, and what their layers are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llm3d.kernels.attention import attention


class Batch(Protocol):
    """What the model reads of a microbatch; `llm3d.data.pretraining.Microbatch` is one."""

    @property
    def tokens(self) -> Tensor: ...  # int64 [tokens]
    @property
    def positions(self) -> Tensor: ...  # int32 [tokens], of each in its sequence
    @property
    def targets(self) -> Tensor: ...  # int64 [tokens], -100 where there is none
    @property
    def cu_seqlens(self) -> Tensor: ...  # int32 [sequences + 1]
    @property
    def max_seqlen(self) -> int: ...  # of the longest sequence; all positions are below it
    @property
    def keys(self) -> Tensor | None: ...  # int64 [tokens], a number for each token; None: nothing is random
    @property
    def noise(self) -> Tensor | None: ...  # fp32 [tokens], how much noise is added to the embedding
    def to(self, device: torch.device | str) -> Batch: ...


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
    positions: Tensor  # int32 [tokens], of each in its sequence
    attend: Attend
    keys: Tensor | None = None  # int64 [tokens], of the tokens' random numbers; None: nothing is random
