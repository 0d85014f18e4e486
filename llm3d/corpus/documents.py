"""Documents out of text files: which files a user meant, how they divide into items of work, what they hold.

    .txt         a document a file, or split at a separator
    .jsonl       a document a line, in a named field
    .json        the same, or a list of such objects
    .parquet     a document a row, in a named column

All but the last may be compressed (.gz, .zst); capital letters count as small ones.

A big file becomes many items, so that processes can share it; the documents of the items, in order, are the
documents of the file, however it was divided.
"""

import glob
import gzip
import io
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from llm3d.errors import InputError
from llm3d.text.unicode import HALF_A_PAIR, has_half_a_pair
from llm3d.wording import first_line, json_kind

_NAMES = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
COMPRESSIONS = (".gz", ".zst")
KINDS = {name + end: kind for name, kind in _NAMES.items() for end in ("", *COMPRESSIONS)} | {
    ".parquet": "parquet"
}
NOT_READ = (  # data all the same
    *(".csv", ".tsv", ".arrow", ".feather", ".xlsx"),
    *(".bz2", ".xz", ".lz4", ".zip", ".tar", *COMPRESSIONS),
)
ITEM_BYTES = 1 << 22
BOM = b"\xef\xbb\xbf"
JSON_SPACES = " \t\r\n"
LINE_START = re.compile(rb"\n(?=\S)")
LAST_LINE_START = re.compile(rb".*\n(?=\S)", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """How documents lie in files. separator: what ends a document in a .txt file; None: its end does."""

    text_field: str = "text"
    separator: str | None = None


@dataclass(frozen=True)
class Item:
    """A part of a file that one process reads.

    start, stop: bytes, or row groups of a parquet file.  data: those bytes, of a compressed file or a list.
    first: lines, entries of a list or rows before it in the file; None: to be counted when an error needs it.
    starts, ends: False where a .txt file's only document goes on from the item before, or into the next one.
    read: bytes of the file that are behind it, for progress.  unit: what is counted, a line or an entry.
    """

    path: str
    kind: str
    start: int
    stop: int
    read: int
    data: bytes | None = None
    first: int | None = None
    starts: bool = True
    ends: bool = True
    unit: str = "line"


@dataclass(frozen=True)
class BadRecord:
    """A document that could not be read: where (file and line) and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


_decode_json = json.JSONDecoder().raw_decode


def find_files(paths: Sequence[str | Path], kinds: Mapping[str, str] = KINDS) -> list[Path]:
    """The files that paths, directories (searched through) and glob patterns name, in order, each once.

    Links are followed. In directories, files that no kind fits are passed over, as are hidden ones.
    kinds: by how their names end, the files that are read.
    Raises InputError for a path that matches nothing, a file of a kind that is not read, data of such a kind in a
    directory, and a link to nothing.
    """
    files: dict[str, Path] = {}  # by what they are beyond links and other names
    for path in (path for given in map(str, paths) for path in _matches(given)):
        for file in _inside(path, kinds) if path.is_dir() else [path]:
            if file_kind(file, kinds) is None:
                raise InputError(f"{file}: not a kind of file that is read ({', '.join(kinds)}); convert it")
            files.setdefault(os.path.realpath(file), file)
    if not files:
        raise InputError("no input files given; name files, directories or patterns such as 'data/*.jsonl'")
    return list(files.values())


def file_kind(path: Path, kinds: Mapping[str, str] = KINDS) -> str | None:
    """'text', 'jsonl', 'json' or 'parquet' by the file's name, None for other files."""
    return next((kind for suffix, kind in kinds.items() if path.name.lower().endswith(suffix)), None)


def _matches(given: str) -> list[Path]:
    if Path(given).exists():
        return [Path(given)]
    matches = sorted(map(Path, glob.glob(given, recursive=True)))
    if not matches:
        near = [p.name for p in Path(given).parent.glob("*")] if Path(given).parent.is_dir() else []
        hint = get_close_matches(Path(given).name, near, n=1)
        raise InputError(f"{given}: no such file" + (f"; did you mean {hint[0]}?" if hint else ""))
    return matches


def _inside(root: Path, kinds: Mapping[str, str]) -> list[Path]:
    """The files of a directory and those below it, through links, that hold data, in order."""
    files, seen = list[Path](), set[str]()
    for directory, below, names in os.walk(root, followlinks=True):
        if os.path.realpath(directory) in seen:
            below.clear()
            continue
        seen.add(os.path.realpath(directory))
        below[:] = [name for name in below if not name.startswith(".")]
        files += [Path(directory, name) for name in names if not name.startswith(".")]
    data = sorted(file for file in files if file_kind(file, kinds) or file.name.lower().endswith(NOT_READ))
    for file in data:
        if not file.exists():
            raise InputError(f"{file}: a link to what does not exist; mend or remove it")
        if file_kind(file, kinds) is None:
            raise InputError(
                f"{file}: not a kind of file that is read; convert it, or name the others, as in '{root}/*.jsonl'"
            )
    if not data:
        raise InputError(f"{root}: no {', '.join(kinds)} files in this directory")
    return data


def divide(path: Path, form: Format) -> Iterator[Item]:
    """The items of a file, in order. Compressed files and lists are read here, others by whoever reads the item.

    Raises InputError for a file that is damaged as a whole.
    """
    kind = str(file_kind(path))
    if kind == "json" and _holds_a_list(path):
        yield from _divide_list(path)
        return
    if kind == "jsonl":
        _check_lines(path)
    kind = "jsonl" if kind == "json" else kind
    if kind == "parquet":
        yield from _divide_parquet(path, form)
    elif _is_compressed(path):
        yield from _divide_compressed(path, form, kind)
    else:
        yield from _divide_plain(path, form, kind)


def _divide_plain(path: Path, form: Format, kind: str) -> Iterator[Item]:
    size = path.stat().st_size
    if size == 0:
        return
    split = kind == "text" and form.separator is None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        start = 0
        while start < size:
            stop = size
            if start + ITEM_BYTES < size:
                stop = _boundary(mapped, start + ITEM_BYTES, kind, form.separator)
            starts, ends = not split or start == 0, not split or stop == size
            yield Item(str(path), kind, start, stop, stop - start, starts=starts, ends=ends)
            start = stop


def _boundary(mapped: mmap.mmap, at: int, kind: str, separator: str | None) -> int:
    """The first place from `at` on where no document or token ends up cut."""
    if kind == "text" and separator is None:
        match = LINE_START.search(mapped, at)
        return match.end() if match else len(mapped)
    mark = b"\n" if kind == "jsonl" else str(separator).encode()
    position = mapped.find(mark, at)
    return len(mapped) if position < 0 else position + len(mark)


def _divide_compressed(path: Path, form: Format, kind: str) -> Iterator[Item]:
    split = kind == "text" and form.separator is None
    lines_before, read_before, starts, rest = 0, 0, True, b""
    with _opened(path) as stream:
        while True:
            block = stream.read(ITEM_BYTES)
            data = rest + block
            cut = _last_boundary(data, kind, form.separator) if block else len(data)
            data, rest = data[:cut], data[cut:]
            if data:
                read = stream.raw_position()
                ends = not split or not block
                yield Item(
                    str(path), kind, 0, len(data), read - read_before, data, lines_before, starts, ends
                )
                lines_before, read_before, starts = lines_before + data.count(b"\n"), read, not split
            if not block:
                return


def _last_boundary(data: bytes, kind: str, separator: str | None) -> int:
    """The last place at which no document or token ends up cut; 0: there is none."""
    if kind == "text" and separator is None:
        match = LAST_LINE_START.match(data)
        return match.end() if match else 0
    mark = b"\n" if kind == "jsonl" else str(separator).encode()
    position = data.rfind(mark)
    return 0 if position < 0 else position + len(mark)


def _divide_list(path: Path) -> Iterator[Item]:
    """One JSON list, as lines that hold an entry each."""
    with _opened(path) as file:
        content = file.read()
    entries, why = parse_json(content.removeprefix(BOM))
    if why is not None:
        raise InputError(f"{path}: {why}; a .json file is one list of objects, or holds an object a line")
    assert entries is not None, "it starts as a list"
    lines, size, share = list[bytes](), 0, path.stat().st_size // max(1, len(entries))
    for number, entry in enumerate(entries, 1):
        lines.append(json.dumps(entry).encode() + b"\n")
        size += len(lines[-1])
        if size >= ITEM_BYTES or number == len(entries):
            first = number - len(lines)
            yield Item(str(path), "jsonl", 0, size, share * len(lines), b"".join(lines), first, unit="entry")
            lines, size = [], 0


def _holds_a_list(path: Path) -> bool:
    """Whether a .json file is a list. Raises InputError where it is not an object a line, either."""
    with _opened(path) as file:
        start = file.read(1 << 20).removeprefix(BOM).lstrip()
    first, end, _ = start.partition(b"\n")
    _, why = parse_json(first) if end else (None, None)
    if why is not None and not start.startswith(b"["):
        raise InputError(f"{path}: neither one list of objects nor an object a line: line 1 is {why}")
    return start.startswith(b"[")


def _check_lines(path: Path) -> None:
    """Raise InputError where a .jsonl file is one list, or its first object goes over several lines."""
    with _opened(path) as file:
        start = file.read(1 << 20).removeprefix(BOM).lstrip()
    first, _, rest = start.partition(b"\n")
    if first.startswith(b"[") and (not rest.strip() or parse_json(first)[1] is not None):
        raise InputError(f"{path}: one list, where a .jsonl file has an object a line; name it .json")
    if first.strip() == b"{":
        raise InputError(
            f"{path}: an object over several lines, where a .jsonl file has an object a line; write each on a line, or "
            "one list of them to a .json file"
        )


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(COMPRESSIONS)


class _Stream:
    """The bytes of a file, taken out of its compression."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self.path, self._raw = path, raw
        self._stream: BinaryIO | io.BufferedIOBase = raw
        if path.name.lower().endswith(".gz"):
            self._stream = gzip.GzipFile(fileobj=raw)
        elif path.name.lower().endswith(".zst"):
            import zstandard

            reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(
                raw, read_across_frames=True
            )
            self._stream = io.BufferedReader(reader, buffer_size=1 << 17)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except Exception as error:  # each library raises its own
            raise InputError(f"{self.path}: damaged or truncated ({error}); copy the file again") from error

    def raw_position(self) -> int:
        """Bytes of the file itself that are read."""
        return self._raw.tell()


@contextmanager
def _opened(path: Path) -> Iterator[_Stream]:
    with open(path, "rb") as raw:
        yield _Stream(path, raw)


def _divide_parquet(path: Path, form: Format) -> Iterator[Item]:
    import pyarrow as pa

    with open_parquet(path) as file:
        if form.text_field not in file.schema_arrow.names:
            raise InputError(f"{path}: no column {form.text_field!r} {_fields_hint(file.schema_arrow.names)}")
        kind = file.schema_arrow.field(form.text_field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (pa.string(), pa.large_string(), pa.string_view()):
            raise InputError(
                f"{path}: column {form.text_field!r} holds {kind}, not text; name another column"
            )
        rows, groups = 0, file.num_row_groups
        share = path.stat().st_size // max(groups, 1)
        for group in range(groups):
            yield Item(str(path), "parquet", group, group + 1, share, first=rows)
            rows += file.metadata.row_group(group).num_rows


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises InputError for what is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def read_item(item: Item, form: Format) -> Iterator[str | BadRecord]:
    """The documents of an item, in order; a BadRecord in the place of one that cannot be read."""
    if item.kind == "jsonl":
        return _read_jsonl(item, form)
    if item.kind == "parquet":
        return _read_parquet(item, form)
    return _read_text(item, form)


def _read_bytes(item: Item) -> bytes:
    if item.data is not None:
        return item.data
    with open(item.path, "rb") as file:
        file.seek(item.start)
        return file.read(item.stop - item.start)


def _lines_before(item: Item) -> int:
    if item.first is not None:
        return item.first
    with open(item.path, "rb") as file:
        left, lines = item.start, 0
        while left:
            block = file.read(min(left, 1 << 24))
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines


def _read_text(item: Item, form: Format) -> Iterator[str | BadRecord]:
    data = _read_bytes(item)
    data = data.removeprefix(BOM) if item.start == 0 and not item.first else data
    parts = data.split(form.separator.encode()) if form.separator else [data]
    line = 0
    for part in parts:
        try:
            text = part.decode()
        except UnicodeDecodeError as error:
            line_in_item = line + part.count(b"\n", 0, error.start)
            yield BadRecord(f"{item.path} line {_lines_before(item) + line_in_item + 1}", _bad_utf8(error))
        else:
            yield text.strip("\r\n") if form.separator else text
        line += part.count(b"\n") + (form.separator or "").count("\n")


def _read_jsonl(item: Item, form: Format) -> Iterator[str | BadRecord]:
    lines_before = None
    field = form.text_field
    for number, line in enumerate(item_lines(item), 1):
        text = _plain_text(line, field)
        if text is not None:
            yield text
            continue
        if not line or line.isspace():
            continue
        text, why = _parse(line, field)
        if why is None:
            yield text
        else:
            lines_before = _lines_before(item) if lines_before is None else lines_before
            yield BadRecord(f"{item.path} {item.unit} {lines_before + number}", why)


def _plain_text(line: Any, field: str) -> str | None:
    """The text of a line in which nothing can be wrong, the fast way; None: look at it with care."""
    try:
        record, end = _decode_json(line)
        text = record[field]
    except (ValueError, TypeError, LookupError, RecursionError, StopIteration):
        return None
    return text if end == len(line) and type(text) is str and "\\u" not in line else None


def item_lines(item: Item) -> list[Any]:
    """The lines of a JSONL item; as bytes if some are not valid UTF-8, for `parse_json` to find which."""
    data = _read_bytes(item)
    data = data.removeprefix(BOM) if item.start == 0 and not item.first else data
    try:
        return data.decode().split("\n")
    except UnicodeDecodeError:
        return data.split(b"\n")


def _parse(line: str | bytes, field: str) -> tuple[str, None] | tuple[str, str]:
    """The text of a JSON line, or why it has none."""
    record, why = parse_json(line)
    if why is not None:
        return "", why
    if not isinstance(record, dict):
        return "", f"{json_kind(record)} where an object with a field {field!r} must stand"
    if field not in record:
        return "", f"no field {field!r} {_fields_hint(list(record))}"
    text = record[field]
    if not isinstance(text, str):
        return "", f"field {field!r} holds {json_kind(text)}, not text"
    if has_half_a_pair(text):
        return "", f"field {field!r} has {HALF_A_PAIR}"
    return text, None


def parse_json(line: str | bytes) -> tuple[Any, None] | tuple[None, str]:
    """What a JSON line holds, or why it cannot be read."""
    try:
        line = (line if isinstance(line, str) else line.decode()).strip(JSON_SPACES)
        record, end = _decode_json(line)
    except UnicodeDecodeError as error:
        return None, _bad_utf8(error)
    except ValueError as error:
        return None, f"not valid JSON ({first_line(error)})"
    except RecursionError:
        return None, "not readable JSON (nested too deeply)"
    if end != len(line):
        return None, f"not valid JSON (more after its end, at column {end + 1})"
    return record, None


def _read_parquet(item: Item, form: Format) -> Iterator[str | BadRecord]:
    import pyarrow.parquet as pq

    row = item.first or 0
    with pq.ParquetFile(item.path) as file:
        batches = file.iter_batches(1024, row_groups=range(item.start, item.stop), columns=[form.text_field])
        for batch in batches:
            for value in batch.column(0):
                row += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    yield BadRecord(f"{item.path} row {row}", _bad_utf8(error))
                    continue
                if text is None:
                    yield BadRecord(f"{item.path} row {row}", f"column {form.text_field!r} is null")
                else:
                    yield text


def _bad_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"


def _fields_hint(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
    return f"(there are: {shown or 'none'}); name the one that holds the text"
