"""Token files in Megatron's `.bin`/`.idx` format: a checked reader and an atomic, streaming writer.

`<prefix>.bin` holds the tokens of every document, end to end. `<prefix>.idx` holds, little-endian:

    9 bytes   magic, b"MMIDIDX\\x00\\x00"
    uint64    version, 1
    uint8     dtype code of the tokens
    uint64    number of sequences, n
    uint64    number of document bounds, documents + 1
    int32[n]  tokens in each sequence
    int64[n]  byte offset of each sequence in the .bin file
    int64[..] document bounds: document d is the sequences from bound d to bound d + 1
    int8[n]   modality of each sequence (multimodal files only; refused here)

(megatron.core.datasets.indexed_dataset). Tokenizers usually write one sequence a document.
"""

import os
import struct
from bisect import bisect_left
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from llm3d.errors import InputError
from llm3d.files import sync
from llm3d.wording import counted

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOATS = {6: "float64", 7: "float32"}
SCAN = 1 << 22  # entries looked at in one go, which bounds the memory that a check takes


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that Megatron picks for a vocabulary: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def index_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def tokens_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


class IndexedReader:
    """The token stream of `<prefix>.bin` and where its documents lie. Tokens and index stay on disk.

    dtype: the tokens' integer dtype.  num_documents, num_tokens: what the files hold.
    Raises InputError when a file is missing, truncated, or disagrees with itself in any field.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        for path in (index_path(prefix), tokens_path(prefix)):
            if not path.is_file():
                raise InputError(f"{path}: no such file; tokenize the corpus, or correct the path")
        code, num_sequences, num_bounds = self._read_header()
        self.dtype = np.dtype(DTYPES[code])
        self._map_index(num_sequences, num_bounds)
        self.num_documents = num_bounds - 1
        self._check_bounds(num_sequences)
        self.num_tokens = self._check_sequences()
        self._map_tokens()

    @property
    def document_offsets(self) -> np.ndarray:
        """Where each document starts in the token stream, then the stream's end: int64 [num_documents + 1].

        Built on each call (8 bytes a document); `document_starts` reads only what a window needs.
        """
        sequence_offsets = np.append(self._pointers // self.dtype.itemsize, self.num_tokens)
        return sequence_offsets[self._bounds]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of all documents laid end to end: a view of the file, [stop - start]."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        return self._tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in the token stream from `start` up to, not including, `stop` where a document starts.

        int64, ascending, without repeats (an empty document starts where the next one does). Reads a few
        entries of the index, by bisection.
        """
        first = bisect_left(range(self.num_documents), start, key=self._document_offset)
        last = bisect_left(range(self.num_documents), stop, lo=first, key=self._document_offset)
        offsets = [self._document_offset(d) for d in range(first, last)]
        return np.unique(np.array(offsets, dtype=np.int64))

    def check_vocab(self, vocab_size: int) -> None:
        """Read every token; raise InputError unless all are in [0, vocab_size)."""
        for start in range(0, self.num_tokens, SCAN):
            tokens = self.tokens(start, min(start + SCAN, self.num_tokens))
            check_token_range(tokens, vocab_size, f"{tokens_path(self.prefix)}")

    def _document_offset(self, document: int) -> int:
        sequence = int(self._bounds[document])
        if sequence == len(self._pointers):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def _read_header(self) -> tuple[int, int, int]:
        path = index_path(self.prefix)
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise InputError(f"{path}: not a Megatron index (it does not start with MMIDIDX); tokenize again")
        if len(header) < HEADER.size:
            raise InputError(f"{path}: truncated in its header ({len(header)} of {HEADER.size} bytes)")
        _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
        if version != VERSION:
            raise InputError(f"{path}: format version {version}; only version {VERSION} exists")
        if code not in DTYPES:
            kind = f"tokens of type {FLOATS[code]}" if code in FLOATS else f"dtype code {code}"
            raise InputError(f"{path}: {kind}; tokens must be integers (codes {sorted(DTYPES)})")
        if num_bounds < 1:
            raise InputError(f"{path}: no document bounds; the file is damaged, tokenize again")
        size = os.path.getsize(path)
        expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
        if size == expected + num_sequences and num_sequences:
            raise InputError(f"{path}: holds a modality per sequence (a multimodal file); give a text corpus")
        if size != expected:
            raise InputError(
                f"{path}: {size} bytes where its header ({num_sequences} sequences, {num_bounds} document "
                f"bounds) needs {expected}; the file is truncated or damaged, copy or tokenize it again"
            )
        if num_sequences == 0:
            raise InputError(f"{path}: the corpus is empty (no sequences); tokenize a file that has text")
        return code, num_sequences, num_bounds

    def _map_index(self, num_sequences: int, num_bounds: int) -> None:
        raw = np.memmap(index_path(self.prefix), dtype=np.uint8, mode="r").view(np.ndarray)
        pointers_at = HEADER.size + 4 * num_sequences
        bounds_at = pointers_at + 8 * num_sequences
        self._lengths = raw[HEADER.size : pointers_at].view("<i4")
        self._pointers = raw[pointers_at:bounds_at].view("<i8")
        self._bounds = raw[bounds_at : bounds_at + 8 * num_bounds].view("<i8")

    def _check_bounds(self, num_sequences: int) -> None:
        path = index_path(self.prefix)
        if self._bounds[0] != 0 or self._bounds[-1] != num_sequences:
            raise InputError(
                f"{path}: document bounds run from {self._bounds[0]} to {self._bounds[-1]}, not from 0 to "
                f"{num_sequences} sequences; the file is damaged, tokenize again"
            )
        for start in range(0, len(self._bounds), SCAN):
            steps = np.diff(self._bounds[start : start + SCAN + 1])
            if (steps < 0).any():
                document = start + int(np.argmax(steps < 0))
                raise InputError(f"{path}: document {document} ends before it starts; tokenize again")

    def _check_sequences(self) -> int:
        """Lengths are not negative and pointers are their running sum. Returns the number of tokens."""
        path, itemsize, total = index_path(self.prefix), self.dtype.itemsize, 0
        for start in range(0, len(self._lengths), SCAN):
            lengths = self._lengths[start : start + SCAN].astype(np.int64)
            if lengths.min() < 0:
                sequence = start + int(np.argmax(lengths < 0))
                raise InputError(f"{path}: sequence {sequence} has a negative length; tokenize again")
            ends = total + np.cumsum(lengths)
            wrong = self._pointers[start : start + SCAN] != (ends - lengths) * itemsize
            if wrong.any():
                sequence = start + int(np.argmax(wrong))
                raise InputError(
                    f"{path}: sequence {sequence} does not start where the one before it ends (byte "
                    f"{self._pointers[sequence]}); the file is damaged, tokenize again"
                )
            total = int(ends[-1])
        return total

    def _map_tokens(self) -> None:
        path = tokens_path(self.prefix)
        size, expected = os.path.getsize(path), self.num_tokens * self.dtype.itemsize
        if self.num_tokens == 0:
            raise InputError(f"{path}: the corpus is empty (no tokens); tokenize a file that has text")
        if size != expected:
            raise InputError(
                f"{path}: {size} bytes where its index needs {expected} ({counted(self.num_tokens, 'token')} of "
                f"{self.dtype}); the file is truncated or damaged, copy or tokenize it again"
            )
        self._tokens = np.memmap(path, dtype=self.dtype.newbyteorder("<"), mode="r").view(np.ndarray)


def check_token_range(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise InputError, naming `where`, unless every token is in [0, vocab_size)."""
    highest, lowest = int(tokens.max()), int(tokens.min())
    if highest >= vocab_size:
        raise InputError(
            f"{where}: holds token {highest} but the vocabulary has {vocab_size}; tokenize the corpus with "
            f"this model's tokenizer, or set model.vocab_size to at least {highest + 1}"
        )
    if lowest < 0:
        raise InputError(f"{where}: holds the negative token {lowest}; tokenize the corpus again")


class IndexedWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`, document by document, in constant memory per token.

    A context manager. Both files have temporary names until the block ends, are then flushed to disk and
    renamed, the index last; if the block raises, nothing is left. One sequence a document.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type):
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        codes = [code for code, known in DTYPES.items() if self.dtype == known]
        assert codes, f"{self.dtype} has no code in Megatron's format"
        self._code = codes[0]
        self._lengths: list[np.ndarray] = []
        self._temporary = {path: path.with_name(f".{path.name}.partial-{os.getpid()}") for path in self.paths}
        self._file = open(self._temporary[tokens_path(prefix)], "wb")  # noqa: SIM115, closed in __exit__

    @property
    def paths(self) -> tuple[Path, Path]:
        return tokens_path(self.prefix), index_path(self.prefix)

    def add_document(self, tokens: np.ndarray) -> None:
        """tokens: integers [n] that fit the dtype."""
        self.add_documents(tokens, np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """tokens: the documents end to end, [sum of lengths]; lengths: tokens in each, [documents]."""
        assert int(lengths.sum()) == len(tokens)
        if len(lengths) and int(lengths.max()) > np.iinfo(np.int32).max:
            raise InputError(
                f"{tokens_path(self.prefix)}: a document of {int(lengths.max())} tokens; the format allows "
                f"{np.iinfo(np.int32).max}; split the text into documents"
            )
        tokens.astype(self.dtype.newbyteorder("<"), copy=False).tofile(self._file)
        self._lengths.append(lengths.astype("<i4"))

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            for temporary in self._temporary.values():
                temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        _sync(self._file)
        with open(self._temporary[index_path(self.prefix)], "wb") as file:
            self._write_index(file)
            _sync(file)
        for path in self.paths:
            os.replace(self._temporary[path], path)
        sync(tokens_path(self.prefix).parent)

    def _write_index(self, file: BinaryIO) -> None:
        num_sequences = sum(map(len, self._lengths))
        file.write(HEADER.pack(MAGIC, VERSION, self._code, num_sequences, num_sequences + 1))
        for lengths in self._lengths:
            lengths.tofile(file)
        pointer = 0
        for lengths in self._lengths:
            ends = pointer + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            (ends - lengths.astype("<i8") * self.dtype.itemsize).tofile(file)
            pointer = int(ends[-1]) if len(ends) else pointer
        for start in range(0, num_sequences + 1, SCAN):
            np.arange(start, min(start + SCAN, num_sequences + 1), dtype="<i8").tofile(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
