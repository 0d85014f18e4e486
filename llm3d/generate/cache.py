"""The keys and values of layers, in blocks of tokens, and how attention finds them. Kwon et al. 2023."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm3d.generate.cuda_graphs import padded_count
from llm3d.generate.scheduler import Decode, Prefill, Running, Work
from llm3d.kernels.attention import attention, parts
from llm3d.kernels.paged_attention import kv_cache_append_, paged_decode_attention
from llm3d.models.batch import Attend
from llm3d.models.decoder import DecoderStage

BLOCK_SIZE = 16


class Inputs(NamedTuple):
    """What a stage needs to run some work, on its device.

    tokens: int64 [tokens].  positions: int32, of each in its sequence.  slots: int64, where its keys and values go; -1:
    nowhere.  cu_seqlens: int32, of prompts laid end to end.
    block_table, lengths: of replies that get a token more; None where prompts are read.
    rows: int64 [sequences], after which token each sequence goes on.
    copies: blocks that are to be copied, int64 [2, blocks]: part of a prompt, for its replies after the first.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    block_table: Tensor | None
    lengths: Tensor | None
    rows: Tensor
    copies: Tensor

    def to(self, device: torch.device) -> Inputs:
        return Inputs(
            *(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self)  # type: ignore[arg-type]
        )


def inputs_of(work: Work, multiple_of: int = 1, width: int | None = None) -> Inputs:
    """multiple_of: tokens are padded to a multiple of it.

    width: of block tables; replies that get a token more then come in few shapes, padded with empty ones. None: no more
    of either than is needed.
    """
    return _prefill(work, multiple_of) if isinstance(work, Prefill) else _decode(work, multiple_of, width)


def _prefill(work: Prefill, multiple_of: int) -> Inputs:
    first = [family[0] for family in work.families]
    prompts = [np.asarray(running.request.prompt, dtype=np.int64) for running in first]
    lengths = [len(prompt) for prompt in prompts]
    positions = [np.arange(length) for length in lengths]
    slots = [_slots(running, places) for running, places in zip(first, positions, strict=True)]
    padding = -sum(lengths) % multiple_of
    segments = [*lengths, *([padding] if padding else [])]
    ends = np.cumsum(lengths)
    rows = [end - 1 for end, family in zip(ends, work.families, strict=True) for _ in family]
    copies = [
        (family[0].blocks[length // BLOCK_SIZE], other.blocks[length // BLOCK_SIZE])
        for family, length in zip(work.families, lengths, strict=True)
        for other in family[1:]
        if length % BLOCK_SIZE
    ]
    return Inputs(
        tokens=_padded(prompts, padding, 0),
        positions=_padded(positions, padding, 0).int(),
        slots=_padded(slots, padding, -1),
        cu_seqlens=torch.tensor([0, *np.cumsum(segments)], dtype=torch.int32),
        max_seqlen=max(segments),
        block_table=None,
        lengths=None,
        rows=torch.tensor(rows),
        copies=torch.tensor(copies, dtype=torch.int64).reshape(-1, 2).t(),
    )


def _slots(running: Running, positions: np.ndarray) -> np.ndarray:
    blocks = np.asarray(running.blocks, dtype=np.int64)
    return blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def _padded(parts: Sequence[np.ndarray], padding: int, value: int) -> Tensor:
    return torch.from_numpy(np.concatenate([*parts, np.full(padding, value)]).astype(np.int64))


def _decode(work: Decode, multiple_of: int, width: int | None) -> Inputs:
    running = work.sequences
    count = len(running) if width is None else padded_count(len(running))
    padding = count + -count % multiple_of - len(running)
    lengths = [r.length for r in running]
    places = [length - 1 for length in lengths]
    slots = [
        r.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for r, i in zip(running, places, strict=True)
    ]
    table = np.zeros((len(running) + padding, width or -(-max(lengths) // BLOCK_SIZE)), dtype=np.int32)
    for row, r in zip(table, running, strict=False):
        used = r.blocks[: len(row)]
        row[: len(used)] = used
    none = [0] * padding
    return Inputs(
        tokens=torch.tensor([r.tokens[-1] for r in running] + none),
        positions=torch.tensor(places + none, dtype=torch.int32),
        slots=torch.tensor(slots + [-1] * padding),
        cu_seqlens=torch.empty(0, dtype=torch.int32),
        max_seqlen=0,
        block_table=torch.from_numpy(table),
        lengths=torch.tensor(lengths + none, dtype=torch.int32),
        rows=torch.arange(len(running)),
        copies=torch.empty(2, 0, dtype=torch.int64),
    )


class Cache:
    """Keys and values of a rank's layers, [blocks, BLOCK_SIZE, kv_heads, head_dim] each."""

    def __init__(
        self, stages: Sequence[DecoderStage], num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, BLOCK_SIZE, *stages[0].kv_shape)
        self.tensors = {
            layer: tuple(torch.empty(shape, dtype=dtype, device=device) for _ in ("keys", "values"))
            for stage in stages
            for layer in stage.numbers
        }

    def attention(self, inputs: Inputs) -> Attend:
        """Keeps the tokens' keys and values; then each token sees those before it in its own sequence."""

        def attend(layer: int, qkv: Tensor, num_heads: int) -> Tensor:
            keys, values = self.tensors[layer]
            q, k, v = parts(qkv, num_heads)
            kv_cache_append_(keys, values, k, v, inputs.slots)
            if inputs.block_table is None or inputs.lengths is None:
                return attention(qkv, num_heads, inputs.cu_seqlens, inputs.max_seqlen)
            scale = q.shape[2] ** -0.5
            return paged_decode_attention(q, keys, values, inputs.block_table, inputs.lengths, scale)

        return attend

    def copy(self, blocks: Tensor) -> None:
        """blocks: int64 [2, n], from and to."""
        if blocks.shape[1]:
            for pair in self.tensors.values():
                for tensor in pair:
                    tensor[blocks[1]] = tensor[blocks[0]]
