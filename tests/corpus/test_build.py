"""A corpus holds every document once, whatever the files, processes and failures on the way to it."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from llm3d.corpus import build as corpus_module
from llm3d.corpus import documents as documents_module
from llm3d.corpus.build import tokenize_corpus
from llm3d.corpus.indexed import IndexedReader
from llm3d.errors import InputError, TrainingAborted
from llm3d.text.tokenizer import load_tokenizer
from tests.corpora import documents, write_jsonl

QUIET = {"workers": 1, "progress": False}


def stored(output, split, tokenizer):
    """The texts of a split, in its order."""
    reader = IndexedReader(output / split)
    texts = []
    for start, stop in zip(reader.document_offsets[:-1], reader.document_offsets[1:], strict=True):
        first, *ids, last = reader.tokens(start, stop).tolist()
        assert (first, last) == (tokenizer.bos_id, tokenizer.eos_id)
        texts.append(tokenizer.decode(ids))
    return texts


def files_of(output):
    return {p.relative_to(output): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


def test_every_document_is_in_one_split_once(corpus_file, tokenizer, tokenizer_directory, tmp_path):
    summary = tokenize_corpus([corpus_file], tmp_path / "c", tokenizer_directory, valid_fraction=0.1, **QUIET)
    train, valid = (stored(tmp_path / "c", split, tokenizer) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(documents(200))
    assert train != documents(200)[: len(train)]
    assert summary["documents"] == {"train": len(train), "valid": len(valid)}
    assert sum(summary["documents"].values()) == 200
    tokens = summary["tokens"]
    assert abs(tokens["valid"] - 0.1 * sum(tokens.values())) < 0.01 * sum(tokens.values())
    assert summary["text_bytes"] == sum(len(text.encode()) for text in documents(200))
    assert summary["dtype"] == "uint16"
    assert json.loads((tmp_path / "c" / "corpus.json").read_text()) == summary
    assert load_tokenizer(tmp_path / "c" / "tokenizer").digest == summary["tokenizer_digest"]
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["corpus.json", "tokenizer", "train.bin", "train.idx", "valid.bin", "valid.idx"]


def test_validation_is_a_share_of_tokens_also_of_few_long_documents(tokenizer, tokenizer_directory, tmp_path):
    """A share that no number of whole documents comes near ends in the end of one that is cut."""
    texts = [*documents(3), *("\n".join(documents(40)[i:]) for i in range(4))]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    for seed in range(4):
        output = tmp_path / str(seed)
        summary = tokenize_corpus(
            [source], output, tokenizer_directory, valid_fraction=0.05, seed=seed, **QUIET
        )
        total, valid = sum(summary["tokens"].values()), summary["tokens"]["valid"]
        assert abs(valid - 0.05 * total) <= 0.1 * 0.05 * total + 1
        assert sum(summary["documents"].values()) in (len(texts), len(texts) + 1)
        read = [IndexedReader(output / split) for split in ("train", "valid")]
        found = np.concatenate([reader.tokens(0, reader.num_tokens) for reader in read])
        ids, _ = tokenizer.encode_documents(texts, tokenizer.eos_id, tokenizer.bos_id)
        assert np.array_equal(np.sort(found), np.sort(ids))


@pytest.mark.parametrize(("asked", "put"), [(None, True), (True, True), (False, False)])
def test_bos_is_put_before_documents_where_the_tokenizer_adds_it_or_it_is_asked_for(
    asked, put, corpus_file, tokenizer, tokenizer_directory, tmp_path
):
    summary = tokenize_corpus([corpus_file], tmp_path / "c", tokenizer_directory, prepend_bos=asked, **QUIET)
    reader = IndexedReader(tmp_path / "c" / "train")
    firsts = [int(reader.tokens(at, at + 1)[0]) for at in reader.document_offsets[:-1]]
    assert all((first == tokenizer.bos_id) == put for first in firsts)
    assert summary["bos_id"] == (tokenizer.bos_id if put else None)
    assert load_tokenizer(tmp_path / "c" / "tokenizer").adds_bos == put


def test_bos_can_be_asked_for_only_of_a_tokenizer_that_has_one(corpus_file, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="set bos_token"):
        tokenize_corpus([corpus_file], tmp_path / "c", tmp_path / "tokenizer.json", prepend_bos=True, **QUIET)


def test_result_depends_on_the_seed_and_not_on_workers_or_items(
    corpus_file, tokenizer_directory, tmp_path, monkeypatch
):
    def run(name, **options):
        tokenize_corpus([corpus_file], tmp_path / name, tokenizer_directory, progress=False, **options)
        return files_of(tmp_path / name)

    one = run("one", workers=1)
    monkeypatch.setattr(documents_module, "ITEM_BYTES", 3000)
    monkeypatch.setattr(corpus_module, "ITEM_BYTES", 3000)
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(corpus_module, "BATCH_TOKENS", 700)
    assert run("small", workers=1) == one
    assert run("two", workers=2) == one
    assert run("other", workers=1, seed=5) != one


def write_kind(directory, kind, texts):
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()
    path = directory / f"data.{kind}"
    if kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n").rstrip())
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
    elif kind == "jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(lines[:1000]) + zstandard.compress(lines[1000:]))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts], indent=1))
    elif kind == "JSON.GZ":  # as C4 is published
        path.write_bytes(gzip.compress(lines))
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress("<|sep|>".join(texts).encode()))
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        column = pa.array(texts).dictionary_encode()
        pq.write_table(pa.table({"n": range(len(texts)), "text": column}), path, row_group_size=30)
    else:
        path.write_text("<|sep|>".join(texts), "utf-8")
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "JSON.GZ", "parquet", "txt", "txt.gz"]
)
def test_every_kind_of_file_gives_the_same_corpus(
    kind, corpus_file, tokenizer_directory, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents_module, "ITEM_BYTES", 3000)
    path = write_kind(tmp_path, kind, documents(200))
    for name, source in (("c", path), ("expected", corpus_file)):
        tokenize_corpus([source], tmp_path / name, tokenizer_directory, separator="<|sep|>", **QUIET)
    for file in ("train.bin", "train.idx", "valid.bin", "valid.idx"):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_a_text_file_is_a_document_however_many_items_it_makes(
    tokenizer, tokenizer_directory, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents_module, "ITEM_BYTES", 500)
    texts = ["\n".join(documents(40)), "short", "\n\n".join(documents(30))]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, "utf-8", newline="")
    (tmp_path / "2.txt").unlink()
    (tmp_path / "2.txt.gz").write_bytes(gzip.compress(texts[2].encode()))
    tokenize_corpus([tmp_path / "*.txt*"], tmp_path / "c", tokenizer_directory, valid_fraction=0, **QUIET)
    assert sorted(stored(tmp_path / "c", "train", tokenizer)) == sorted(texts)
    assert not (tmp_path / "c" / "valid.bin").exists()
    # One item or many: the same tokens.
    reader = IndexedReader(tmp_path / "c" / "train")
    assert reader.num_tokens == sum(len(ids) + 2 for ids in tokenizer.encode_batch(texts))


def test_a_single_document_gives_its_end_for_validation(
    tokenizer, tokenizer_directory, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents_module, "ITEM_BYTES", 500)
    text = "\n".join(documents(40))
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    tokenize_corpus([tmp_path / "a.txt"], tmp_path / "c", tokenizer_directory, valid_fraction=0.1, **QUIET)
    train, valid = (IndexedReader(tmp_path / "c" / split) for split in ("train", "valid"))
    tokens = [*train.tokens(0, train.num_tokens), *valid.tokens(0, valid.num_tokens)]
    assert tokens == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert valid.num_tokens == round(0.1 * len(tokens))
    assert train.num_documents == valid.num_documents == 1


BAD = [
    (b'{"text": "cut', "line 3: not valid JSON"),
    (b'{"text": "a"} x', "line 3: not valid JSON .more after its end"),
    (b'{"text": "\xff"}', "line 3: not valid UTF-8 .byte 0xff"),
    (b'{"body": "a", "title": 1}', "line 3: no field 'text' .there are: body, title"),
    (b'{"text": 5}', "line 3: field 'text' holds a number, not text"),
    (b'{"text": null}', "line 3: field 'text' holds null, not text"),
    (b'["text"]', "line 3: a list where an object"),
    (b"7", "line 3: a number where an object"),
    (b'{"text": "\\ud83d"}', "line 3: field 'text' has half of a surrogate pair"),
    (b"[" * 100_000, "line 3: not"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[message[8:40] for _, message in BAD])
def test_a_bad_line_is_named_and_leaves_nothing(line, message, tokenizer_directory, tmp_path):
    good = b'{"text": "good"}\n'
    (tmp_path / "x.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(InputError, match=rf"x\.jsonl {message}") as error:
        tokenize_corpus([tmp_path / "x.jsonl"], tmp_path / "c", tokenizer_directory, **QUIET)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["x.jsonl"]
    summary = tokenize_corpus(
        [tmp_path / "x.jsonl"],
        tmp_path / "c",
        tokenizer_directory,
        valid_fraction=0.5,
        skip_bad=True,
        **QUIET,
    )
    assert summary["bad_records"]["total"] == 1
    assert "x.jsonl line 3" in summary["bad_records"]["first"][0]
    assert summary["documents"] == {"train": 1, "valid": 1}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_bad_lines_are_numbered_across_items_and_processes(kind, tokenizer_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "ITEM_BYTES", 2000)
    monkeypatch.setattr(corpus_module, "ITEM_BYTES", 2000)
    lines = [json.dumps({"text": text}) for text in documents(100)]
    for number in (17, 60, 95):
        lines[number - 1] = "{"
    data = "\n".join(lines).encode()
    path = tmp_path / f"x.{kind}"
    path.write_bytes(gzip.compress(data) if kind == "jsonl.gz" else data)
    options = {"workers": 2, "progress": False}
    with pytest.raises(InputError, match="line 17: "):
        tokenize_corpus([path], tmp_path / "c", tokenizer_directory, **options)
    summary = tokenize_corpus([path], tmp_path / "c", tokenizer_directory, skip_bad=True, **options)
    found = [bad.split(":")[0].split()[-1] for bad in summary["bad_records"]["first"]]
    assert (found, summary["bad_records"]["total"]) == (["17", "60", "95"], 3)


def test_a_text_file_that_is_not_utf8_is_left_out_whole(
    tokenizer, tokenizer_directory, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents_module, "ITEM_BYTES", 100)
    text = "\n".join(["line"] * 100)
    (tmp_path / "good.txt").write_text(text)
    (tmp_path / "latin.txt").write_bytes((text + "\ncaf\xe9\n" + text).encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt line 101: not valid UTF-8"):
        tokenize_corpus([tmp_path], tmp_path / "c", tokenizer_directory, **QUIET)
    options = {"skip_bad": True, "valid_fraction": 0, **QUIET}
    tokenize_corpus([tmp_path], tmp_path / "c", tokenizer_directory, **options)
    assert stored(tmp_path / "c", "train", tokenizer) == [text]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, "no column 'text' .there are: body"),
        ({"text": [1]}, "column 'text' holds int64, not text"),
        ({"text": ["a", None]}, "row 2: column 'text' is null"),
    ],
)
def test_bad_parquet_is_named(table, message, tokenizer_directory, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=rf"x\.parquet.*{message}"):
        tokenize_corpus([tmp_path], tmp_path / "c", tokenizer_directory, **QUIET)


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz", "x.jsonl.zst"])
def test_damaged_files_are_named(name, tokenizer_directory, tmp_path):
    (tmp_path / name).write_bytes(b"not what the name says")
    with pytest.raises(InputError, match=name):
        tokenize_corpus([tmp_path], tmp_path / "c", tokenizer_directory, **QUIET)
    assert os.listdir(tmp_path) == [name]


def test_truncated_compression_is_found(corpus_file, tokenizer_directory, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    for name, compress in (("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(compress(corpus_file.read_bytes())[:-20])
        with pytest.raises(InputError, match=f"{name}"):
            tokenize_corpus([tmp_path / name], tmp_path / "c", tokenizer_directory, **QUIET)


def test_input_that_cannot_be_used_is_refused(corpus_file, tokenizer_directory, tmp_path):
    def run(files, **options):
        tokenize_corpus(files, tmp_path / "c", tokenizer_directory, **{**QUIET, **options})

    write_jsonl(tmp_path / "empty.jsonl", [" ", "", "\n"])
    (tmp_path / "notes.pdf").write_text("x")
    for files, message in [
        ([], "no input files"),
        ([tmp_path / "empty.jsnl"], "no such file; did you mean empty.jsonl"),
        ([tmp_path / "*.csv"], "no such file"),
        ([tmp_path / "notes.pdf"], "not a kind of file"),
        ([tmp_path / "empty.jsonl"], "the corpus is empty .3 documents without text"),
    ]:
        with pytest.raises(InputError, match=message):
            run(files)
    for options in ({"valid_fraction": 1}, {"valid_fraction": -0.1}, {"workers": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            run([corpus_file], **options)
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "notes.pdf"]


def test_a_corpus_is_replaced_only_when_asked(corpus_file, tokenizer_directory, tmp_path):
    def run(**options):
        tokenize_corpus([corpus_file], tmp_path / "c", tokenizer_directory, **QUIET, **options)

    run()
    before = files_of(tmp_path / "c")
    with pytest.raises(InputError, match="not empty"):
        run(seed=2)
    assert files_of(tmp_path / "c") == before
    run(seed=2, overwrite=True)
    assert files_of(tmp_path / "c") != before
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_nothing(error, corpus_file, tokenizer_directory, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(corpus_module.IndexedWriter, "add_documents", fail)
    expected = TrainingAborted if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        tokenize_corpus([corpus_file], tmp_path / "c", tokenizer_directory, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_interrupting_the_processes_leaves_nothing(corpus_file, tokenizer_directory, tmp_path):
    script = f"""
import os, signal
from llm3d.corpus import build as corpus
class Interrupting(corpus._Progress):
    def advance(self, *_):
        os.kill(os.getpid(), signal.SIGINT)
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where what started the tests ignores it
    corpus._Progress, corpus.ITEM_BYTES = Interrupting, 1
    corpus.tokenize_corpus([{str(corpus_file)!r}], {str(tmp_path / "c")!r}, {str(tokenizer_directory)!r}, workers=2)
"""
    (tmp_path / "script.py").write_text(script)
    root = os.path.dirname(os.path.dirname(os.path.dirname(corpus_module.__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, str(tmp_path / "script.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")
    assert os.listdir(tmp_path) == ["script.py"]


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 70_000, "b": 1, "</s>": 2}, unk_token="b")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "x.jsonl", ["a b a"])
    summary = tokenize_corpus(
        [tmp_path / "x.jsonl"], tmp_path / "c", tmp_path / "tokenizer.json", valid_fraction=0, **QUIET
    )
    reader = IndexedReader(tmp_path / "c" / "train")
    assert (summary["dtype"], reader.dtype) == ("int32", np.int32)
    assert reader.tokens(0, 4).tolist() == [70_000, 1, 70_000, 2]


def test_a_tokenizer_without_an_end_of_text_is_refused(corpus_file, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="no end-of-text token"):
        tokenize_corpus([corpus_file], tmp_path / "c", tmp_path / "tokenizer.json", **QUIET)
