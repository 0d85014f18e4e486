"""Pretraining samples: windows of token files in the order of `llm3d.data.order`, and their microbatches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm3d.corpus.indexed import IndexedReader, check_token_range
from llm3d.data.order import SampleOrder, order_digest
from llm3d.errors import InputError
from llm3d.wording import counted

IGNORED = -100  # the target that no loss counts
LOOKED_AT = 100  # documents of a source that tell what its documents begin with
FULL_SCAN = 1 << 27  # tokens up to which a source is read through at the start to check its vocabulary


@dataclass(frozen=True)
class Window:
    """A window of a source.

    tokens: int64 [sequence_length + 1]; the last is a target only.
    document_starts: positions in [0, sequence_length) where a document starts, 0 always first.
    ends_document: a document starts at position sequence_length, so the last target is another document's.
    """

    tokens: Tensor
    document_starts: list[int]
    ends_document: bool = False


@dataclass(frozen=True)
class Microbatch:
    """Samples laid end to end, T tokens, with the segments that attention keeps apart.

    tokens: int64 [T].  targets: int64 [T], -100 where ignored (what follows a document's last token belongs
    to another document).  positions: int32 [T], of each token in its segment.  cu_seqlens: int32 [segments + 1], where
    segments start, then T.  max_seqlen: the longest segment.  num_targets: targets that count.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_targets: int
    keys: None = None  # nothing is random
    noise: None = None

    def to(self, device: torch.device | str) -> "Microbatch":
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
        )


def collate(samples: Sequence[Window]) -> Microbatch:
    """Lay samples of one length end to end; every sample and every document in it opens a segment."""
    length = len(samples[0].tokens) - 1
    assert all(len(sample.tokens) == length + 1 for sample in samples)
    tokens = torch.cat([sample.tokens[:-1] for sample in samples])
    targets = torch.cat([sample.tokens[1:] for sample in samples])
    starts, last = [], []  # of segments in the microbatch, and last tokens of documents
    for i, sample in enumerate(samples):
        starts += [i * length + start for start in sample.document_starts]
        last += [i * length + start - 1 for start in sample.document_starts[1:]]
        last += [i * length + length - 1] if sample.ends_document else []
    targets[last] = IGNORED
    cu_seqlens = torch.tensor([*starts, len(tokens)], dtype=torch.int32)
    return Microbatch(
        tokens=tokens,
        targets=targets,
        positions=positions_of(cu_seqlens),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        num_targets=len(tokens) - len(last),
    )


def positions_of(cu_seqlens: Tensor) -> Tensor:
    """Of tokens in their segments, int32 [T]. cu_seqlens: int32 [segments + 1], where segments start, then T."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    return torch.arange(len(starts), dtype=torch.int32) - starts


class PretrainingData:
    """Samples of `sequence_length` tokens out of weighted sources, by global number, on any rank alike.

    sources: (path, weight); a path is a prefix (`/corpus/train`, of train.bin and train.idx) or a directory
    that holds `<split>.bin`. Window w of a source is its tokens [w * S, w * S + S + 1), S the sequence
    length; the at most S tokens that fill no window are never seen.
    split_documents: report where documents start, so that attention and loss stay inside them.
    seed: of the order.  vocab_size: tokens at or above it end the run.
    Raises InputError for files that are missing or damaged, a source shorter than a window, a weight that is
    not positive, and tokens outside the vocabulary (small sources at once, large ones when a sample has one).
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        sequence_length: int,
        seed: int,
        vocab_size: int,
        split_documents: bool = True,
        split: str = "train",
    ):
        _check_sources(sources)
        self.sequence_length, self.vocab_size = sequence_length, vocab_size
        self.split_documents = split_documents
        self.readers = [IndexedReader(resolve_prefix(path, split)) for path, _ in sources]
        self.windows_per_source = [_num_windows(reader, sequence_length) for reader in self.readers]
        for reader in self.readers:
            if reader.num_tokens <= FULL_SCAN:
                reader.check_vocab(vocab_size)
        self.order = SampleOrder([weight for _, weight in sources], self.windows_per_source, seed)
        self.digest = order_digest(
            [reader.num_tokens for reader in self.readers],
            [reader.num_documents for reader in self.readers],
            [weight for _, weight in sources],
            sequence_length,
            seed,
        )

    def starts_with(self, token: int) -> bool:
        """Whether the documents of every source begin with this token; the first ones tell."""
        firsts = [
            reader.tokens(start, start + 1)[0]
            for reader in self.readers
            for start in reader.document_offsets[:LOOKED_AT]
            if start < reader.num_tokens
        ]
        return all(first == token for first in firsts)

    @property
    def num_windows(self) -> int:
        """Windows over all sources: `window(i)` for i in range(num_windows) reads all data once."""
        return sum(self.windows_per_source)

    def epochs(self, num_samples: int) -> list[float]:
        """How often a run of `num_samples` samples passes over each source."""
        shares = zip(self.order.blend.weights, self.windows_per_source, strict=True)
        return [num_samples * weight / windows for weight, windows in shares]

    def sample(self, k: int) -> Window:
        """Global sample k of the run, k >= 0 without bound: sources repeat, each epoch in a new order."""
        return self._read(*self.order.place(k))

    def window(self, index: int) -> Window:
        """Window `index` in [0, num_windows), source after source as stored. For evaluation."""
        for source, windows in enumerate(self.windows_per_source):
            if index < windows:
                return self._read(source, index)
            index -= windows
        raise IndexError("window index out of range")

    def _read(self, source: int, window: int) -> Window:
        reader, length = self.readers[source], self.sequence_length
        start = window * length
        stored = reader.tokens(start, start + length + 1)
        check_token_range(stored, self.vocab_size, f"{reader.prefix}.bin")
        tokens = torch.from_numpy(stored.astype(np.int64))
        if not self.split_documents:
            return Window(tokens, [0])
        starts = [int(at) - start for at in reader.document_starts(start + 1, start + length + 1)]
        ends_document = bool(starts) and starts[-1] == length
        return Window(tokens, [0, *starts[: len(starts) - ends_document]], ends_document)


def resolve_prefix(path: str, split: str) -> str:
    """A prefix of .bin/.idx files, from that prefix, one of the two files, or the directory of a corpus."""
    if Path(path).is_dir():
        return str(Path(path) / split)
    return path.removesuffix(".bin").removesuffix(".idx")


def _num_windows(reader: IndexedReader, sequence_length: int) -> int:
    if reader.num_tokens < sequence_length + 1:
        raise InputError(
            f"{reader.prefix}.bin: {counted(reader.num_tokens, 'token')}, fewer than one sample takes: sequence_length "
            f"+ 1 = {sequence_length + 1}; lower data.sequence_length or add text"
        )
    return (reader.num_tokens - 1) // sequence_length


def _check_sources(sources: Sequence[tuple[str, float]]) -> None:
    if not sources:
        raise InputError("no data sources given; name at least one corpus")
    for path, weight in sources:
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"{path}: weight {weight} is not a positive number; set one, or leave it out")
