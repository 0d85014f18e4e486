"""A microbatch as models read it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """What the model reads of a microbatch; `llm3d.data.pretraining.Microbatch` is one."""

    @property
    def tokens(self) -> Tensor: ...  # int64 [tokens]
    @property
    def targets(self) -> Tensor: ...  # int64 [tokens], -100 where there is none
    @property
    def cu_seqlens(self) -> Tensor: ...  # int32 [sequences + 1]
    @property
    def max_seqlen(self) -> int: ...
    @property
    def keys(self) -> Tensor | None: ...  # int64 [tokens], a number for each token; None: nothing is random
    @property
    def noise(self) -> Tensor | None: ...  # fp32 [tokens], how much noise is added to the embedding
    def to(self, device: torch.device | str) -> Batch: ...
