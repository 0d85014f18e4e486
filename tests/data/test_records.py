"""Every row of a file is read with its place, and what is no row is said with its place."""

import gzip
import json

import pytest

from llm3d.data import documents
from llm3d.data.documents import BadRecord
from llm3d.data.records import Record, find_record_files, read_records
from llm3d.errors import InputError

ROWS = [
    {"question": "1 + 1?", "answer": "2", "history": [["a", "b"]], "score": 0.5},
    {"question": "床前明月光", "answer": "疑是地上霜", "history": [], "score": 1.0},
    {"question": "\u2028 \x85 \0", "answer": "\n", "history": None, "score": None},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path, content=LINES):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pytest.importorskip("zstandard").compress(content)
    path.write_bytes(content)
    return path


@pytest.fixture(params=["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def file(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".json":
        return write(path, b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
        return path
    return write(path)


def test_all_kinds_of_files_hold_the_same_rows(file):
    place = {".json": "entry", ".parquet": "row"}.get(file.suffix, "line")
    expected = [Record(f"{file} {place} {number}", row) for number, row in enumerate(ROWS, 1)]
    assert list(read_records(file)) == expected


def test_line_numbers_count_all_lines_however_the_file_is_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ITEM_BYTES", 40)
    content = b"\xef\xbb\xbf" + b"\n".join(b"" if i % 7 == 0 else b'{"n": %d}' % i for i in range(1, 100))
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write(tmp_path / name, content)
        records = list(read_records(path))
        assert records == [Record(f"{path} line {i}", {"n": i}) for i in range(1, 100) if i % 7]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[1]", "a list where an object must stand"),
        (b'"text"', "a string where an object must stand"),
        (b"null", "null where an object must stand"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} {}', "more after its end, at column 9"),
        (b'{"a": "\xff"}', "not valid UTF-8 (byte 0xff)"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_object_is_named_and_the_others_are_read(tmp_path, line, why):
    path = write(tmp_path / "a.jsonl", b'{"a": "\xc3\xa9"}\n\n' + line + b"\n" + b'{"a": 2}\r\n')
    first, bad, last = read_records(path)
    assert (first, last) == (Record(f"{path} line 1", {"a": "é"}), Record(f"{path} line 4", {"a": 2}))
    assert isinstance(bad, BadRecord) and bad.where == f"{path} line 3"
    assert why in bad.why


def test_an_entry_that_is_no_object_is_named(tmp_path):
    path = write(tmp_path / "a.json", b'[{"a": 1}, 2]')
    assert list(read_records(path)) == [
        Record(f"{path} entry 1", {"a": 1}),
        BadRecord(f"{path} entry 2", "a number where an object must stand"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"a": 1}', "an object where a list of objects must stand"),
        ("a.json", LINES, "more after its end.* must be named .jsonl"),
        ("a.json", b"", "not valid JSON"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        list(read_records(tmp_path / name))


def test_files_are_found_by_name_directory_and_pattern(tmp_path):
    names = ("a.jsonl", "b.json", "c.jsonl.gz", "d.jsonl.zst", "e.parquet")
    for name in (*names, "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_record_files([tmp_path])] == list(names)
    assert [path.name for path in find_record_files([tmp_path / "[ab].json*"])] == ["a.jsonl", "b.json"]
    with pytest.raises(InputError, match=r"a\.jsn: no such file; did you mean a.jsonl\?"):
        find_record_files([tmp_path / "a.jsn"])
    with pytest.raises(InputError, match=r"notes.txt: not a kind of file that is read .*\.json"):
        find_record_files([tmp_path / "notes.txt"])
