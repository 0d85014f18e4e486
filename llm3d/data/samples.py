"""Tokenized samples of post-training data: how they lie in memory, and how one that is too long is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Truncation = Literal["drop", "left", "right"]


class Tokens(NamedTuple):
    """A sequence. ids: int32 [length].  is_target: bool [length], the tokens that are learned."""

    ids: np.ndarray
    is_target: np.ndarray


class Sample(NamedTuple):
    """Sequences that are used together: a conversation, or a prompt with each of its replies.

    ranks: one a sequence, of a reply, lower is better.  margin: between two replies; 0 where none is given.
    row: the number of the row of its file that it was made of.
    """

    sequences: tuple[Tokens, ...]
    ranks: tuple[float, ...] = (0.0,)
    margin: float = 0.0
    row: int = 0


@dataclass(frozen=True)
class SampleSet:
    """Samples end to end.

    ids: int32 [tokens].  is_target: bool [tokens].  sequence_starts: int64 [sequences + 1], tokens.
    sample_starts: int64 [samples + 1], sequences.  ranks: float32 [sequences].  margins: float32 [samples].
    rows: int64 [samples].
    """

    ids: np.ndarray
    is_target: np.ndarray
    sequence_starts: np.ndarray
    sample_starts: np.ndarray
    ranks: np.ndarray
    margins: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> SampleSet:
        samples = list(samples)
        sequences = [sequence for sample in samples for sequence in sample.sequences]
        ranks = [rank for sample in samples for rank in sample.ranks]
        return cls(
            ids=_joined([sequence.ids for sequence in sequences], np.int32),
            is_target=_joined([sequence.is_target for sequence in sequences], np.bool_),
            sequence_starts=_starts([len(sequence.ids) for sequence in sequences]),
            sample_starts=_starts([len(sample.sequences) for sample in samples]),
            ranks=np.array(ranks, dtype=np.float32),
            margins=np.array([sample.margin for sample in samples], dtype=np.float32),
            rows=np.array([sample.row for sample in samples], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.margins)

    @property
    def num_sequences(self) -> int:
        return len(self.ranks)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, over all its sequences: int64 [samples]."""
        return np.diff(self.sequence_starts[self.sample_starts])

    def __getitem__(self, index: int) -> Sample:
        first, last = self.sample_starts[index : index + 2]
        spans = zip(self.sequence_starts[first:last], self.sequence_starts[first + 1 : last + 1], strict=True)
        sequences = tuple(Tokens(self.ids[start:stop], self.is_target[start:stop]) for start, stop in spans)
        ranks = tuple(self.ranks[first:last].tolist())
        return Sample(sequences, ranks, float(self.margins[index]), int(self.rows[index]))

    def chosen(self, which: np.ndarray) -> SampleSet:
        """Some of the samples. which: bool [samples]."""
        return SampleSet.of(self[int(i)] for i in np.flatnonzero(which))

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all that is trained on."""
        hasher = hashlib.sha256()
        for array in (
            self.ids,
            self.is_target,
            self.sequence_starts,
            self.sample_starts,
            self.ranks,
            self.margins,
        ):
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def mismatched(prompt: Tokens, reply: Tokens, max_length: int) -> Tokens:
    """What stands before the first learned token of one sequence, then another one's from there on; cut at its end."""
    starts = [int(np.argmax(sequence.is_target)) for sequence in (prompt, reply)]
    ids = np.concatenate([prompt.ids[: starts[0]], reply.ids[starts[1] :]])[:max_length]
    is_target = np.concatenate([prompt.is_target[: starts[0]], reply.is_target[starts[1] :]])[:max_length]
    return Tokens(ids, is_target)


def why_useless(sequences: Sequence[Tokens]) -> str | None:
    """Why nothing can be learned from a sample with these sequences; None: something can."""
    # A sequence's first token follows nothing, and so is not learned.
    if not all(sequence.is_target[1:].any() for sequence in sequences):
        return "none of its replies is learned"
    written = {sequence.ids.tobytes() for sequence in sequences}
    return None if len(written) == len(sequences) else "the chat template makes two replies the same"


def fitted(sample: Sample, max_length: int, truncation: Truncation, bos_id: int | None) -> Sample | None:
    """The sample with no sequence above max_length; None where it is left out for being too long.

    right: the ends are cut off. left: the start, the same number of tokens of each sequence, so that replies keep one
    prompt; a leading bos stays. Where that leaves nothing to learn, or no difference of replies, it is left out, too.
    """
    longest = max(len(sequence.ids) for sequence in sample.sequences)
    if longest <= max_length:
        return sample
    if truncation == "drop":
        return None
    if truncation == "right":
        sequences = [Tokens(ids[:max_length], target[:max_length]) for ids, target in sample.sequences]
    else:
        sequences = [without_start(sequence, longest - max_length, bos_id) for sequence in sample.sequences]
    return sample._replace(sequences=tuple(sequences)) if why_useless(sequences) is None else None


def without_start(sequence: Tokens, excess: int, bos_id: int | None) -> Tokens:
    kept = 1 if bos_id is not None and sequence.ids[0] == bos_id else 0
    keep = np.ones(len(sequence.ids), dtype=bool)
    keep[kept : kept + excess] = False
    return Tokens(sequence.ids[keep], sequence.is_target[keep])
