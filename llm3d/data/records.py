"""Rows of post-training data, each with its place.

    .jsonl, .jsonl.gz, .jsonl.zst     an object a line
    .json                             one list of objects
    .parquet                          a row with its columns

A row is a dictionary from column to value, whatever the file; formats.py says what the columns mean.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm3d.data.documents import (
    BOM,
    KINDS,
    BadRecord,
    Format,
    divide,
    file_kind,
    find_files,
    item_lines,
    json_kind,
    open_parquet,
    parse_json,
)
from llm3d.errors import InputError

RECORD_KINDS = {suffix: kind for suffix, kind in KINDS.items() if kind != "text"} | {".json": "json"}


class Record(NamedTuple):
    """A row and its place: "PATH line N", "PATH entry N" of a list or "PATH row N" of a parquet file, from 1."""

    where: str
    row: dict[str, Any]


def find_record_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files with rows that paths, directories and glob patterns name. Raises InputError, as `find_files`."""
    return find_files(paths, RECORD_KINDS)


def read_records(path: Path) -> Iterator[Record | BadRecord]:
    """The rows of a file, in order; a BadRecord in the place of one that is no object. Blank lines are no rows.

    Raises InputError for a file that is damaged as a whole.
    """
    readers = {"jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet}
    return readers[str(file_kind(path, RECORD_KINDS))](path)


def _read_jsonl(path: Path) -> Iterator[Record | BadRecord]:
    lines_before = 0
    for item in divide(path, Format()):
        lines = item_lines(item)
        for number, line in enumerate(lines, lines_before + 1):
            if line and not line.isspace():
                yield _record(f"{path} line {number}", *parse_json(line))
        lines_before += len(lines) - 1  # all but the last end in a newline, and an item ends after one


def _read_json(path: Path) -> Iterator[Record | BadRecord]:
    entries, why = parse_json(path.read_bytes().removeprefix(BOM))
    if why is not None:
        raise InputError(f"{path}: {why}; a file with an object a line must be named .jsonl")
    if not isinstance(entries, list):
        raise InputError(f"{path}: {json_kind(entries)} where a list of objects must stand")
    for number, entry in enumerate(entries, 1):
        yield _record(f"{path} entry {number}", entry, None)


def _read_parquet(path: Path) -> Iterator[Record | BadRecord]:
    number = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(1024):
            for i in range(batch.num_rows):
                number += 1
                where = f"{path} row {number}"
                try:
                    yield Record(where, batch.slice(i, 1).to_pylist()[0])
                except UnicodeDecodeError:
                    yield BadRecord(where, "not valid UTF-8; write the file again from text in UTF-8")


def _record(where: str, value: Any, why: str | None) -> Record | BadRecord:
    if why is None and not isinstance(value, dict):
        why = f"{json_kind(value)} where an object must stand"
    return Record(where, value) if why is None else BadRecord(where, why)
