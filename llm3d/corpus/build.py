"""Text files to a shuffled corpus of tokens, by many processes.

Each process encodes items of the files (llm3d.corpus.documents) into a shard of its own; the documents are then
copied out of the shards in shuffled order. The result depends on neither the number of processes nor timing.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm3d.corpus.documents import ITEM_BYTES, BadRecord, Format, Item, divide, find_files, read_item
from llm3d.corpus.indexed import IndexedWriter, token_dtype
from llm3d.errors import InputError, TrainingAborted
from llm3d.files import check_output, new_directory, write_json
from llm3d.permutation import derive_key, permute
from llm3d.text.tokenizer import Tokenizer, load_tokenizer
from llm3d.wording import counted

SUMMARY = "corpus.json"
BATCH_CHARACTERS = 1 << 20  # encoded in one call
BATCH_TOKENS = 1 << 22  # copied from shards in one go
BAD_SHOWN = 20
NEAR = 0.1  # of the share for validation: how far whole documents may be from it
PARALLELISM = "TOKENIZERS_PARALLELISM"  # of the tokenizers library, over threads


def tokenize_corpus(
    files: Sequence[str | Path],
    output: str | Path,
    tokenizer_path: str | Path,
    *,
    text_field: str = "text",
    separator: str | None = None,
    workers: int | None = None,
    seed: int = 1234,
    valid_fraction: float = 0.01,
    prepend_bos: bool | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenize text files into `<output>/train` and `<output>/valid` (.bin and .idx). All or nothing.

    files: paths, directories, patterns; kinds as in llm3d.corpus.documents.  text_field: of JSON lines, or the
    column of parquet.  separator: what ends a document in .txt files; None: a file is a document.  workers:
    processes, None for one a core (a script that calls this with several needs the usual `if __name__ ==
    "__main__"`).  seed: of the shuffle of documents.  valid_fraction: of tokens, for validation; the document at the
    border is cut where that comes nearer to it; 0: no validation files.  prepend_bos: put the tokenizer's bos
    before every document; None: where the tokenizer adds one to a text.  skip_bad: leave out records that cannot
    be read, and list the first ones; otherwise the first ends the run.  overwrite: replace a corpus at `output`.

    Every document ends in the tokenizer's eos token; documents without text are left out. The output also
    holds the tokenizer and `corpus.json`, which is what is returned: documents and tokens of each split,
    text_bytes, empty_documents, bad_records {total, first}, vocab_size, dtype, bos_id (null: not put), eos_id,
    tokenizer_digest, seed, valid_fraction, sources. Takes twice the output's space on disk meanwhile, and about
    40 bytes of memory a document. Raises InputError; TrainingAborted when the disk is full.
    """
    if not 0 <= valid_fraction < 1:
        raise InputError(f"valid_fraction {valid_fraction}: must be at least 0 and below 1")
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers}: must be at least 1")
    check_output(Path(output).absolute(), overwrite, SUMMARY)
    tokenizer = _open_tokenizer(tokenizer_path, prepend_bos)
    job = _Job(str(tokenizer_path), Format(text_field, separator), skip_bad, tokenizer.adds_bos)
    paths = find_files(files)
    try:
        with new_directory(output, overwrite, SUMMARY) as directory:
            parts = _encode_files(
                paths, job, tokenizer, directory / "shards", workers or _num_cores(), progress
            )
            documents = _documents(parts, paths)
            splits = _split(documents, seed, valid_fraction)
            dtype = token_dtype(tokenizer.vocab_size)
            written = {
                name: _write_split(directory / name, documents, order, dtype, progress)
                for name, order in splits.items()
            }
            shutil.rmtree(directory / "shards")
            tokenizer.save_to(directory / "tokenizer")
            summary = {
                "documents": {name: counts[0] for name, counts in written.items()},
                "tokens": {name: counts[1] for name, counts in written.items()},
                "text_bytes": parts.text_bytes,
                "empty_documents": parts.empty,
                "bad_records": {"total": parts.num_bad, "first": [str(bad) for bad in parts.bad]},
                "vocab_size": tokenizer.vocab_size,
                "dtype": dtype.name,
                "bos_id": tokenizer.bos_id if tokenizer.adds_bos else None,
                "eos_id": tokenizer.eos_id,
                "tokenizer_digest": tokenizer.digest,
                "seed": seed,
                "valid_fraction": valid_fraction,
                "sources": [{"path": str(path), "bytes": path.stat().st_size} for path in paths],
            }
            write_json(directory / SUMMARY, summary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingAborted(
                f"{output}: the disk is full; free some space, or write elsewhere"
            ) from error
        raise
    return summary


def _open_tokenizer(path: str | Path, prepend_bos: bool | None) -> Tokenizer:
    """The tokenizer, which adds a bos where documents are to begin with one."""
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_id is None:
        raise InputError(f"{path}: no end-of-text token; set eos_token in tokenizer_config.json")
    if prepend_bos and tokenizer.bos_id is None:
        raise InputError(f"{path}: no token to put before documents; set bos_token in tokenizer_config.json")
    return tokenizer if prepend_bos is None else tokenizer.with_bos(prepend_bos)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Job:
    """What every process needs to know."""

    tokenizer_path: str
    form: Format
    skip_bad: bool
    adds_bos: bool


@dataclass
class _Encoded:
    """What became of an item: its documents lie end to end from `offset` tokens into `shard`."""

    shard: str
    offset: int
    lengths: np.ndarray  # int64 [documents], the eos tokens included
    text_bytes: int = 0
    empty: int = 0
    num_bad: int = 0
    bad: list[BadRecord] = field(default_factory=list)  # the first BAD_SHOWN


@dataclass
class _Parts:
    """Documents, or parts of long ones, in the order of the files: a row each."""

    shards: list[str]
    shard: np.ndarray  # int32 [rows], index into shards
    offset: np.ndarray  # int64 [rows], tokens into the shard
    length: np.ndarray  # int64 [rows]
    starts: np.ndarray  # bool [rows], whether a document starts with this row
    text_bytes: int
    empty: int
    num_bad: int
    bad: list[BadRecord]


# Encoding: the main process


def _encode_files(
    paths: list[Path], job: _Job, tokenizer: Tokenizer, shards: Path, workers: int, progress: bool
) -> _Parts:
    shards.mkdir()
    size = sum(path.stat().st_size for path in paths)
    items = (item for path in paths for item in divide(path, job.form))
    if workers == 1 or size <= ITEM_BYTES:
        results = _encode_here(items, job, shards, tokenizer)
    else:
        results = _encode_in_processes(items, job, shards, workers)
    encoded: list[tuple[Item, _Encoded]] = []
    with closing(results), _Progress(size, progress) as bar:
        for item, result in results:
            if result.num_bad and not job.skip_bad:
                raise InputError(f"{result.bad[0]}; correct it, or skip bad records")
            encoded.append((item, result))
            bar.advance(item.read, result.text_bytes, len(result.lengths))
    return _collect(encoded)


def _encode_here(
    items: Iterable[Item], job: _Job, shards: Path, tokenizer: Tokenizer
) -> Generator[tuple[Item, _Encoded], None, None]:
    """Encode items in this process, on one core, as a small corpus is not worth the start of others."""
    setting = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    worker = _make_worker(job, shards, tokenizer, lambda: False)
    try:
        for item in items:
            yield item, _encode_item(worker, item)
    finally:
        worker.shard.close()
        del os.environ[PARALLELISM]
        os.environ.update({} if setting is None else {PARALLELISM: setting})


def _encode_in_processes(
    items: Iterable[Item], job: _Job, shards: Path, workers: int
) -> Generator[tuple[Item, _Encoded], None, None]:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=(job, shards, stop))
    try:
        yield from _in_order(pool, items, ahead=4 * workers)
    except BrokenProcessPool as error:
        raise InputError(
            "a tokenizing process died, most likely for lack of memory; use fewer workers"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, items: Iterable[Item], ahead: int
) -> Generator[tuple[Item, _Encoded], None, None]:
    """Encode items, at most `ahead` of them at a time; yield them in their order, without their data."""
    waiting: deque[tuple[Item, Future[_Encoded]]] = deque()
    for item in items:
        waiting.append((_without_data(item), pool.submit(_encode_in_this_process, item)))
        if len(waiting) >= ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


def _without_data(item: Item) -> Item:
    return Item(item.path, item.kind, item.start, item.stop, item.read, starts=item.starts, ends=item.ends)


def _collect(encoded: list[tuple[Item, _Encoded]]) -> _Parts:
    broken = {item.path for item, result in encoded if result.num_bad and not (item.starts and item.ends)}
    kept = [(item, result) for item, result in encoded if item.path not in broken]
    shards = sorted({result.shard for _, result in kept})
    number = {shard: i for i, shard in enumerate(shards)}
    counts = [len(result.lengths) for _, result in kept]
    starts = [np.full(len(result.lengths), item.starts) for item, result in kept]
    offsets = [result.offset + np.cumsum(result.lengths) - result.lengths for _, result in kept]
    return _Parts(
        shards=shards,
        shard=np.repeat(np.array([number[result.shard] for _, result in kept], dtype=np.int32), counts),
        offset=np.concatenate([np.zeros(0, np.int64), *offsets]),
        length=np.concatenate([np.zeros(0, np.int64), *(result.lengths for _, result in kept)]),
        starts=np.concatenate([np.zeros(0, bool), *starts]),
        text_bytes=sum(result.text_bytes for _, result in kept),
        empty=sum(result.empty for _, result in encoded),
        num_bad=sum(result.num_bad for _, result in encoded),
        bad=[bad for _, result in encoded for bad in result.bad][:BAD_SHOWN],
    )


# Encoding: each process


@dataclass
class _Worker:
    job: _Job
    tokenizer: Tokenizer
    dtype: np.dtype
    shard: BinaryIO
    stopped: Callable[[], bool]


_worker: _Worker  # of this process, where it is one of many


def _make_worker(job: _Job, shards: Path, tokenizer: Tokenizer, stopped: Callable[[], bool]) -> _Worker:
    shard = open(shards / f"{os.getpid()}.tokens", "wb")  # noqa: SIM115, lives as long as the process
    return _Worker(job, tokenizer, token_dtype(tokenizer.vocab_size), shard, stopped)


def _start_process(job: _Job, shards: Path, stop: Event) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops this one
    os.environ[PARALLELISM] = "false"
    tokenizer = load_tokenizer(job.tokenizer_path).with_bos(job.adds_bos)
    _worker = _make_worker(job, shards, tokenizer, stop.is_set)


def _encode_in_this_process(item: Item) -> _Encoded:
    return _encode_item(_worker, item)


def _encode_item(worker: _Worker, item: Item) -> _Encoded:
    result = _Encoded(worker.shard.name, worker.shard.tell() // worker.dtype.itemsize, np.zeros(0, np.int64))
    lengths = []
    for batch in _batches(read_item(item, worker.job.form), result, worker.job.skip_bad):
        if worker.stopped():
            break
        ids, batch_lengths = _encode(worker.tokenizer, batch, item)
        ids.astype(worker.dtype).tofile(worker.shard)
        lengths.append(batch_lengths)
        result.text_bytes += len("".join(batch).encode())
    worker.shard.flush()
    result.lengths = np.concatenate([result.lengths, *lengths])
    return result


def _encode(tokenizer: Tokenizer, batch: list[str], item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end, and their lengths; only what starts a document gets a bos, what ends one an eos."""
    bos_id, eos_id = tokenizer.bos_id if tokenizer.adds_bos else None, tokenizer.eos_id
    assert eos_id is not None
    if item.starts and item.ends:
        return tokenizer.encode_documents(batch, eos_id, bos_id)
    (text,) = batch
    ids = tokenizer.encode_arrays([text])[0] if item.starts else tokenizer.encode_next(text)
    before = [bos_id] if item.starts and bos_id is not None else []
    ids = np.concatenate([before, ids, [eos_id] if item.ends else []]).astype(np.int32)
    return ids, np.array([len(ids)])


def _batches(documents: Iterator[str | BadRecord], result: _Encoded, skip_bad: bool) -> Iterator[list[str]]:
    """Documents with text, in batches of about BATCH_CHARACTERS; the others are counted in `result`."""
    batch, characters = [], 0
    for document in documents:
        if isinstance(document, BadRecord):
            result.num_bad += 1
            result.bad += [document] if len(result.bad) < BAD_SHOWN else []
            if not skip_bad:
                return
        elif not document or document.isspace():
            result.empty += 1
        else:
            batch.append(document)
            characters += len(document)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


# Writing the documents in shuffled order


@dataclass
class _Documents:
    """Rows `first[d]` to `first[d + 1]` of the parts make up document d."""

    parts: _Parts
    first: np.ndarray  # int64 [documents + 1]

    def __len__(self) -> int:
        return len(self.first) - 1

    def sizes(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.add.reduceat(self.parts.length, self.first[:-1])

    def cut(self, document: int, kept: int) -> int:
        """Make what follows the first `kept` tokens of a document one of its own; -> its number."""
        parts, rows = self.parts, slice(self.first[document], self.first[document + 1])
        length = parts.length[rows].copy()
        front = np.clip(kept - (np.cumsum(length) - length), 0, length)  # of each row
        parts.length[rows] = front
        parts.shard = np.append(parts.shard, parts.shard[rows])
        parts.offset = np.append(parts.offset, parts.offset[rows] + front)
        parts.length = np.append(parts.length, length - front)
        self.first = np.append(self.first, len(parts.length))
        return len(self) - 1


def _documents(parts: _Parts, paths: Sequence[Path]) -> _Documents:
    if not len(parts.length):
        tally = f"{counted(parts.empty, 'document')} without text, {counted(parts.num_bad, 'bad record')}"
        raise InputError(f"{paths[0]}: the corpus is empty ({tally}); name files that hold text")
    return _Documents(parts, np.append(np.flatnonzero(parts.starts), len(parts.starts)))


def _split(documents: _Documents, seed: int, valid_fraction: float) -> dict[str, np.ndarray]:
    """The documents of each split, int64, shuffled: for validation the first ones, by tokens.

    Where whole documents come nowhere near the share, as when they are few and long, the next one is cut, and its
    end is used for validation.
    """
    order = permute(np.arange(len(documents)), len(documents), derive_key(seed))
    if not valid_fraction:
        return {"train": order}
    sizes = documents.sizes()[order]
    total = int(sizes.sum())
    if total < 2:
        raise InputError("the corpus is a single token; add text, or set valid_fraction to 0")
    valid_tokens = min(max(1, round(total * valid_fraction)), total - 1)
    before = np.cumsum(sizes) - sizes  # tokens of the documents in front
    count = int(np.argmin(np.abs(before - valid_tokens)))
    if abs(int(before[count]) - valid_tokens) <= NEAR * valid_tokens:
        return {"train": order[count:], "valid": order[:count]}
    count = int(np.searchsorted(before, valid_tokens)) - 1
    cut = documents.cut(int(order[count]), int(sizes[count]) - (valid_tokens - int(before[count])))
    return {"train": order[count:], "valid": np.append(order[:count], cut)}


def _write_split(
    prefix: Path, documents: _Documents, order: np.ndarray, dtype: np.dtype, progress: bool
) -> tuple[int, int]:
    """Write documents in the given order; returns how many documents and tokens."""
    total = 0
    with (
        IndexedWriter(prefix, dtype) as writer,
        _Progress(len(order), progress, f"write {prefix.name}") as bar,
    ):
        for tokens, lengths in _gather(documents, order, dtype):
            writer.add_documents(tokens, lengths)
            total += len(tokens)
            bar.advance(len(lengths))
    return len(order), total


def _gather(
    documents: _Documents, order: np.ndarray, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents out of the shards, in batches of about BATCH_TOKENS: tokens end to end, and lengths."""
    parts = documents.parts
    shards = [np.memmap(shard, dtype=dtype, mode="r").view(np.ndarray) for shard in parts.shards]
    sizes = documents.sizes()[order]
    ends = np.cumsum(sizes)
    at = 0
    while at < len(order):
        before = ends[at - 1] if at else 0
        stop = max(at + 1, int(np.searchsorted(ends, before + BATCH_TOKENS, side="right")))
        rows = _rows(documents, order[at:stop])
        columns = (parts.shard[rows].tolist(), parts.offset[rows].tolist(), parts.length[rows].tolist())
        pieces = [shards[i][start : start + length] for i, start, length in zip(*columns, strict=True)]
        yield np.concatenate(pieces), sizes[at:stop]
        at = stop


def _rows(documents: _Documents, chosen: np.ndarray) -> np.ndarray:
    """The rows of the parts that make up the chosen documents, in order. int64."""
    first = documents.first[chosen]
    counts = documents.first[chosen + 1] - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within


class _Progress:
    """A bar on standard error: how far, and for text how fast."""

    def __init__(self, total: int, shown: bool, what: str = "tokenize"):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task(what, total=total, speed="")
        self._started = time.monotonic()
        self._text_bytes = self._documents = 0

    def advance(self, done: int, text_bytes: int = 0, documents: int = 0) -> None:
        self._text_bytes += text_bytes
        self._documents += documents
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = f"{self._documents / seconds:,.0f} docs/s, {self._text_bytes / seconds / 1e6:.1f} MB/s"
        self._bar.update(self._task, advance=done, speed=speed if self._documents else "")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
