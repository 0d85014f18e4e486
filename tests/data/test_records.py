"""Every row of a file is read with its place, and what is no row is said with its place."""

import gzip
import json

import pytest

from llm3d.corpus import documents
from llm3d.corpus.documents import BadRecord
from llm3d.data.records import Record, find_record_files, read_records
from llm3d.errors import InputError

ROWS = [
    {"question": "1 + 1?", "answer": "2", "history": [["a", "b"]], "score": 0.5},
    {"question": "床前明月光", "answer": "疑是地上霜", "history": [], "score": 1.0},
    {"question": "\u2028 \x85 \0", "answer": "\n", "history": None, "score": None},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path, content=LINES):
    if path.suffix.lower() == ".gz" and content[:2] != b"\x1f\x8b":
        content = gzip.compress(content)
    if path.suffix.lower() == ".zst":
        content = pytest.importorskip("zstandard").compress(content)
    path.write_bytes(content)
    return path


NAMES = (
    *("a.jsonl", "a.jsonl.gz", "A.JSONL.GZ", "a.jsonl.zst", "a.JsonL.Zst", "a.ndjson", "lines.json"),
    *("lines.json.gz", "lines.json.ZST", "a.json", "a.json.gz", "a.json.zst", "a.parquet", "A.PARQUET"),
)


@pytest.fixture(params=NAMES)
def file(request, tmp_path):
    path = tmp_path / request.param
    if is_list(path):
        return write(path, b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode())
    if path.suffix.lower() == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
        return path
    return write(path)


def is_list(path):
    return path.name.startswith("a.json") and not path.name.startswith("a.jsonl")


def test_all_kinds_of_files_hold_the_same_rows(file):
    place = "row" if file.suffix.lower() == ".parquet" else "entry" if is_list(file) else "line"
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
        ("a.json", b'{\n"a": 1\n}', "neither one list of objects nor an object a line"),
        ("a.json", b'[{"a": 1}', "one list of objects"),
        ("a.jsonl", b'[\n  {"a": 1},\n  {"a": 2}\n]', "name it .json"),
        ("a.jsonl", b'\xef\xbb\xbf[{"a": 1},\n{"a": 2}]\n', "name it .json"),
        ("a.jsonl", b'[{"a": 1}, {"a": 2}]', "name it .json"),
        ("a.jsonl.gz", gzip.compress(b"[" + b'{"a": 1},' * 200_000 + b'{"a": 1}]\n'), "name it .json"),
        ("a.jsonl", b'{\n  "a": 1\n}\n{\n  "a": 2\n}\n', "an object over several lines"),
        ("a.json.gz", gzip.compress(LINES)[:-20], "damaged or truncated"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        list(read_records(tmp_path / name))


def test_files_are_found_by_name_directory_and_pattern(tmp_path):
    names = ("a.jsonl", "b.json", "c.jsonl.gz", "d.JSONL.Zst", "e.parquet")
    for name in (*names, "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in find_record_files([tmp_path])] == list(names)
    assert [path.name for path in find_record_files([tmp_path / "[ab].json*"])] == ["a.jsonl", "b.json"]
    with pytest.raises(InputError, match=r"a\.jsn: no such file; did you mean a.jsonl\?"):
        find_record_files([tmp_path / "a.jsn"])
    with pytest.raises(InputError, match=r"notes.txt: not a kind of file that is read .*\.json"):
        find_record_files([tmp_path / "notes.txt"])


def test_links_are_followed_and_every_file_is_read_once(tmp_path):
    """As in the cache of the Hugging Face hub, where a data set is a directory of links."""
    blobs, data = tmp_path / "blobs", tmp_path / "data"
    for directory in (blobs / "more", data):
        directory.mkdir(parents=True)
    for blob in (blobs / "0123", blobs / "more" / "b.jsonl"):
        blob.write_text("{}\n")
    (data / "a.jsonl").symlink_to(blobs / "0123")
    (data / "below").symlink_to(blobs / "more", target_is_directory=True)
    (blobs / "more" / "back").symlink_to(data, target_is_directory=True)
    expected = [data / "a.jsonl", data / "below" / "b.jsonl"]
    assert find_record_files([data]) == expected
    assert (
        find_record_files([data, data / "below", f"{data}/*.jsonl", data / "below" / "b.jsonl"]) == expected
    )


@pytest.mark.parametrize(("name", "target", "why"), [
    ("a.csv", None, "not a kind of file that is read; convert it, or name the others"),
    ("a.jsonl.bz2", None, "not a kind of file that is read; convert it, or name the others"),
    ("a.jsonl", "nowhere", "a link to what does not exist"),
])  # fmt: skip
def test_data_in_a_directory_is_not_passed_over_in_silence(tmp_path, name, target, why):
    (tmp_path / "b.jsonl").touch()
    if target is None:
        (tmp_path / name).touch()
    else:
        (tmp_path / name).symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=f"{name}: {why}"):
        find_record_files([tmp_path])


def test_columns_of_parquet_mean_the_same_whatever_their_types(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    said = [["a", "b"], ["c", "d"]]
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    messages = [[{"role": "user", "content": text} for text in texts] for texts in said]
    columns = {
        "plain": pa.array(["a", "b"]),
        "large": pa.array(["a", "b"], pa.large_string()),
        "view": pa.array(["a", "b"], pa.string_view()),
        "few": pa.array(["a", "b"]).dictionary_encode(),
        "messages": pa.array(messages, pa.list_(message)),
        "large_messages": pa.array(messages, pa.large_list(message)),
        "maps": pa.array(
            [[list(m.items()) for m in ms] for ms in messages], pa.list_(pa.map_("string", "string"))
        ),
    }
    texts = [[json.dumps(message) for message in said] for said in messages]
    columns["own_fields"] = pa.array(texts, pa.list_(pa.string())).cast(
        pa.list_(pa.json_())
    )  # as datasets does
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = [record.row for record in read_records(tmp_path / "a.parquet") if isinstance(record, Record)]
    for row, text, expected in zip(rows, "ab", messages, strict=True):
        assert row == dict.fromkeys(("plain", "large", "view", "few"), text) | dict.fromkeys(
            ("messages", "large_messages", "maps", "own_fields"), expected
        ), "and a field that a message does not have is not there"
