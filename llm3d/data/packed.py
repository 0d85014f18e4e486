"""Microbatches of samples of different lengths: laid end to end, without padding between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from llm3d.data.pretraining import IGNORED, positions_of
from llm3d.data.samples import Sample

B = TypeVar("B", bound="PackedBatch")


@dataclass(frozen=True)
class PackedBatch:
    """Samples' sequences laid end to end, T tokens; each sequence is a segment that attention keeps apart.

    tokens: int64 [T].  targets: int64 [T], the next token where it is learned, else -100.
    positions: int32 [T], of each token in its segment.
    cu_seqlens: int32 [segments + 1]; padding, if any, is a segment of its own at the end.
    last_tokens: int64 [sequences], where each sequence ends.  sequence_of: int64 [T], padding counted to the last.
    better, worse: int64 [pairs], which sequences are compared: all pairs of a sample's replies that differ in rank.
    ranks: fp32 [sequences], of replies, lower is better; of a labeled one 0 where it is desirable, else 1.
    pair_weights: fp32 [pairs], those of a sample add up to 1.  margins: fp32 [pairs].
    reference: fp32 [sequences], the reference model's log-probability of the targets, where it is known beforehand.
    keys: int64 [T], a number for each token that no other token of the run has, for what is random in training.
    noise: fp32 [T], how much of it the embedding gets.
    mismatched: the samples' prompts, each with the reply of another sample of the step.
    kl: fp32 scalar, the policy's KL divergence from its reference, where the loss is relative to it.
    num_targets, num_samples: of the microbatch.
    step_samples, step_chosen_targets: of the whole step, over all ranks; see `chosen_targets`.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    last_tokens: Tensor
    sequence_of: Tensor
    ranks: Tensor
    better: Tensor
    worse: Tensor
    pair_weights: Tensor
    margins: Tensor
    reference: Tensor | None
    max_seqlen: int
    num_targets: int
    num_samples: int
    step_samples: int = 0
    step_chosen_targets: float = 0.0
    keys: Tensor | None = None
    noise: Tensor | None = None
    mismatched: PackedBatch | None = None
    kl: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.last_tokens)

    @property
    def target_counts(self) -> Tensor:
        """How many targets each sequence has: fp32 [sequences]."""
        return self.sum_by_sequence((self.targets >= 0).float())

    def sum_by_sequence(self, x: Tensor) -> Tensor:
        """Sums over the tokens of each sequence.

        x: fp32 [T], 0 where there is no target.  -> fp32 [sequences]; of padding alone it is empty.
        """
        sums = x.new_zeros(max(1, self.num_sequences))  # padding alone has no sequence
        return sums.index_add(0, self.sequence_of, x)[: self.num_sequences]

    def to(self: B, device: torch.device | str) -> B:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=True)
            elif isinstance(value, PackedBatch):
                values[name] = value.to(device)
        return type(self)(**values)


def collate(samples: Sequence[Sample], multiple_of: int = 1, reference: Tensor | None = None) -> PackedBatch:
    """Lay samples end to end, and pad to a multiple of some number of tokens; no samples give padding alone."""
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    lengths = [len(sequence.ids) for sequence in sequences]
    num_tokens = sum(lengths)
    padding = max(-num_tokens % multiple_of, 0 if num_tokens else multiple_of)
    tokens = torch.zeros(num_tokens + padding, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    start = 0
    for ids, is_target in sequences:
        part = torch.from_numpy(ids.astype("int64"))
        tokens[start : start + len(ids)] = part
        learned = torch.from_numpy(is_target[1:].copy())
        targets[start : start + len(ids) - 1] = part[1:].masked_fill(~learned, IGNORED)
        start += len(ids)
    segments = torch.tensor([*lengths, *([padding] if padding else [])])
    ends = segments.cumsum(0)
    sequence_of = torch.arange(len(segments)).repeat_interleave(segments)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    pairs = list(_pairs(samples))
    return PackedBatch(
        tokens=tokens,
        targets=targets,
        positions=positions_of(cu_seqlens),
        cu_seqlens=cu_seqlens,
        last_tokens=ends[: len(sequences)] - 1,
        sequence_of=sequence_of.clamp(max=max(0, len(sequences) - 1)),
        ranks=torch.tensor([rank for sample in samples for rank in sample.ranks], dtype=torch.float32),
        better=torch.tensor([pair.better for pair in pairs], dtype=torch.int64),
        worse=torch.tensor([pair.worse for pair in pairs], dtype=torch.int64),
        pair_weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        reference=reference,
        max_seqlen=int(segments.max()),
        num_targets=int((targets != IGNORED).sum()),
        num_samples=len(samples),
    )


def with_noise(batch: PackedBatch, keys: Sequence[int], alpha: float = 0.0) -> PackedBatch:
    """The batch with what training draws random numbers by.

    keys: one for each of its sequences, below 2^63.  alpha: of the noise that a sequence of one token gets; the noise
    falls with the square root of the length.
    """
    lengths = batch.cu_seqlens.diff().long()
    of_segment = torch.tensor([*keys, *[0] * (len(lengths) - len(keys))])
    token_keys = of_segment.repeat_interleave(lengths) ^ batch.positions.long() << 40
    if not alpha:
        return replace(batch, keys=token_keys)
    return replace(batch, keys=token_keys, noise=(alpha / lengths.float().sqrt()).repeat_interleave(lengths))


def chosen_targets(samples: Sequence[Sample]) -> float:
    """Targets of the better replies, over all pairs, those of a sample with weights that add up to 1."""
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    return sum(pair.weight * sequences[pair.better].is_target[1:].sum() for pair in _pairs(samples))


class _Pair(NamedTuple):
    better: int
    worse: int
    weight: float
    margin: float


def _pairs(samples: Sequence[Sample]) -> Iterator[_Pair]:
    first = 0
    for sample in samples:
        pairs = [
            (i, j)
            for i, rank in enumerate(sample.ranks)
            for j, other in enumerate(sample.ranks)
            if rank < other
        ]
        for better, worse in pairs:
            yield _Pair(first + better, first + worse, 1 / len(pairs), sample.margin)
        first += len(sample.sequences)
