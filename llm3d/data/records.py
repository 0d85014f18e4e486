"""Rows of post-training data, each with its place.

    .jsonl       an object a line
    .json        the same, or one list of objects
    .parquet     a row with its columns

The first two may be compressed (.gz, .zst).
A row is a dictionary from column to value, whatever the file; formats.py says what the columns mean.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm3d.corpus.documents import (
    KINDS,
    BadRecord,
    Format,
    divide,
    file_kind,
    find_files,
    item_lines,
    open_parquet,
    parse_json,
)
from llm3d.wording import json_kind

RECORD_KINDS = {suffix: kind for suffix, kind in KINDS.items() if kind != "text"}


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
    return _read_parquet(path) if file_kind(path) == "parquet" else _read_json(path)


def _read_json(path: Path) -> Iterator[Record | BadRecord]:
    before = 0
    for item in divide(path, Format()):
        lines = item_lines(item)
        for number, line in enumerate(lines, before + 1):
            if line and not line.isspace():
                yield _record(f"{path} {item.unit} {number}", *parse_json(line))
        before += len(lines) - 1  # all but the last end in a newline, and an item ends after one


def _read_parquet(path: Path) -> Iterator[Record | BadRecord]:
    number = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(1024):
            for i in range(batch.num_rows):
                number += 1
                where = f"{path} row {number}"
                try:
                    (row,) = batch.slice(i, 1).to_pylist(maps_as_pydicts="strict")
                    values = {field.name: _json_value(row[field.name], field.type) for field in batch.schema}
                except UnicodeDecodeError:
                    yield BadRecord(where, "not valid UTF-8; write the file again from text in UTF-8")
                except ValueError as error:
                    yield BadRecord(where, f"not valid JSON ({error})")
                else:
                    yield Record(where, values)


def _json_value(value: Any, kind: Any) -> Any:
    """What JSON would hold in the place of a parquet value of an Arrow type.

    All structs of a column have the same fields, so those that are null are not there; and `datasets` keeps objects
    of which each has its own fields as texts of JSON.
    """
    import pyarrow as pa

    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {f.name: _json_value(value[f.name], f.type) for f in kind if value[f.name] is not None}
    if pa.types.is_map(kind):
        return {name: _json_value(item, kind.item_type) for name, item in value.items()}
    return [_json_value(item, kind.value_type) for item in value] if isinstance(value, list) else value


def _record(where: str, value: Any, why: str | None) -> Record | BadRecord:
    if why is None and not isinstance(value, dict):
        why = f"{json_kind(value)} where an object must stand"
    return Record(where, value) if why is None else BadRecord(where, why)
