"""Low-rank adapters of a model's projections: which there are, and what parts of them a rank holds.

Named as in PEFT: the factors of `model.layers.0.self_attn.q_proj.weight`, [out, in], are
`model.layers.0.self_attn.q_proj.lora_A.weight`, [rank, in], and `...lora_B.weight`, [out, rank].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.distributed import ProcessGroup

from llm3d.config import LoRASettings
from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.collectives import is_alone
from llm3d.parallel.layers import LowRankAdapter


def scale(lora: LoRASettings) -> float:
    """What B A x is multiplied by; with rslora, Kalajdzievski 2023."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def column_adapters(pieces: Sequence[Piece], lora: LoRASettings, group: ProcessGroup) -> list[LowRankAdapter]:
    """For those of a column-parallel layer's projections that lora.targets names."""
    adapters = []
    for piece in _targeted(pieces, lora):
        a, b = _factors(piece.box, lora)
        first, count = piece.box.offset[0], piece.box.size[0]
        adapters.append(
            LowRankAdapter(
                _replicated(a, group),
                Piece(b.rows(first, count), owned=piece.owned, partial=piece.partial),
                slice(piece.row, piece.row + count),
                scale(lora),
                lora.dropout,
            )
        )
    return adapters


def row_adapters(piece: Piece, lora: LoRASettings, group: ProcessGroup) -> list[LowRankAdapter]:
    """For a row-parallel layer's projection, if lora.targets names it."""
    adapters = []
    for target in _targeted([piece], lora):
        a, b = _factors(target.box, lora)
        part = Piece(a.columns(target.box.offset[1], target.box.size[1]))
        adapters.append(
            LowRankAdapter(part, _replicated(b, group), slice(0, b.size[0]), scale(lora), lora.dropout)
        )
    return adapters


def _targeted(pieces: Sequence[Piece], lora: LoRASettings) -> list[Piece]:
    return [piece for piece in pieces if lora.rank and piece.box.name.split(".")[-2] in lora.targets]


def _factors(weight: Box, lora: LoRASettings) -> tuple[Box, Box]:
    """A and B, whole."""
    name = weight.name.removesuffix(".weight")
    rows, columns = weight.shape
    a = Box.whole(f"{name}.lora_A.weight", (lora.rank, columns))
    return a, Box.whole(f"{name}.lora_B.weight", (rows, lora.rank))


def _replicated(box: Box, group: ProcessGroup) -> Piece:
    return Piece(box, owned=group.rank() == 0, partial=None if is_alone(group) else group)


@contextmanager
def adapters_off(stages: Iterable[nn.Module]) -> Iterator[None]:
    """The model without its adapters, for the time of the block."""
    adapters = [
        module for stage in stages for module in stage.modules() if isinstance(module, LowRankAdapter)
    ]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
