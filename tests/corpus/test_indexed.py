"""Token files: what is written is read, megatron-core agrees both ways, and damage of any field is found."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3d.corpus import indexed
from llm3d.corpus.indexed import HEADER, IndexedReader, IndexedWriter, token_dtype
from llm3d.errors import InputError

DOCUMENTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def write(prefix, documents, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "corpus", DOCUMENTS)


@settings(max_examples=30)
@given(
    documents=st.lists(st.lists(st.integers(0, 65499), min_size=1, max_size=9), min_size=1, max_size=30),
    dtype=st.sampled_from([np.uint16, np.int32]),
    data=st.data(),
)
def test_what_is_written_is_read(tmp_path_factory, documents, dtype, data):
    reader = IndexedReader(write(tmp_path_factory.mktemp("corpus") / "x", documents, dtype))
    stream = [token for document in documents for token in document]
    starts = np.cumsum([0, *map(len, documents)])
    assert (reader.num_documents, reader.num_tokens, reader.dtype) == (len(documents), len(stream), dtype)
    assert reader.document_offsets.tolist() == starts.tolist()
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert reader.tokens(start, stop).tolist() == stream[start:stop]
    assert reader.document_starts(start, stop).tolist() == [at for at in starts[:-1] if start <= at < stop]


def test_vocabulary_decides_the_dtype():
    assert [token_dtype(size) for size in (32000, 65499, 65500, 128256)] == ["u2", "u2", "i4", "i4"]


def test_megatron_reads_our_files(prefix):
    theirs = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is the reference here"
    )
    dataset = theirs.IndexedDataset(str(prefix))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.index.dtype is np.uint16


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons_files_with_several_sequences_a_document(tmp_path, dtype):
    theirs = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is the reference here"
    )
    torch = pytest.importorskip("torch")
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.add_item(torch.tensor([7, 8]))
    builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    reader = IndexedReader(tmp_path / "x")
    assert reader.tokens(0, 8).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert reader.document_offsets.tolist() == [0, 5, 6, 8]
    assert reader.document_starts(0, 8).tolist() == [0, 5, 6]


def header_field(number, value):
    """Overwrite a field of the header: 0 magic, 1 version, 2 dtype, 3 sequences, 4 bounds."""

    def damage(content):
        fields = list(HEADER.unpack(content[: HEADER.size]))
        fields[number] = value
        return HEADER.pack(*fields) + content[HEADER.size :]

    return damage


def entry(kind, at, value):
    """Overwrite bytes behind the header with a number."""

    def damage(content):
        start = HEADER.size + at
        number = struct.pack(kind, value)
        return content[:start] + number + content[start + len(number) :]

    return damage


LENGTHS, POINTERS, BOUNDS = 0, 4 * 4, 12 * 4  # where they start, behind the header of four documents


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "not a Megatron index"),
        (lambda content: content[:20], "truncated in its header"),
        (lambda content: content[:-1], "truncated or damaged"),
        (lambda content: content + b"\0", "truncated or damaged"),
        (lambda content: content + bytes(4), "multimodal"),
        (header_field(0, b"MMIDIDY\0\0"), "not a Megatron index"),
        (header_field(1, 2), "version 2"),
        (header_field(2, 7), "float32"),
        (header_field(2, 99), "dtype code 99"),
        (header_field(2, 4), "bytes where its index needs|does not start where"),
        (header_field(3, 3), "truncated or damaged"),
        (header_field(3, 2**60), "truncated or damaged"),
        (header_field(4, 0), "no document bounds"),
        (header_field(4, 6), "truncated or damaged"),
        (entry("<i", LENGTHS, -3), "sequence 0 has a negative length"),
        (entry("<i", LENGTHS + 4, 2), "sequence 2 does not start where"),
        (entry("<i", LENGTHS + 12, 5), "bytes where its index needs"),
        (entry("<q", POINTERS, 2), "sequence 0 does not start where"),
        (entry("<q", POINTERS + 16, 2), "sequence 2 does not start where"),
        (entry("<q", BOUNDS, 1), "document bounds run from 1"),
        (entry("<q", BOUNDS + 8, 3), "document 1 ends before it starts"),
        (entry("<q", BOUNDS + 8, -1), "document 0 ends before it starts"),
        (entry("<q", BOUNDS + 32, 5), "document bounds run from 0 to 5"),
    ],
)
def test_a_damaged_index_is_refused(prefix, damage, message):
    path = indexed.index_path(prefix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        IndexedReader(prefix)
    assert str(prefix) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"\0\0", lambda c: b""])
def test_tokens_of_the_wrong_size_are_refused(prefix, change):
    path = indexed.tokens_path(prefix)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match="truncated or damaged"):
        IndexedReader(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, suffix):
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(InputError, match=rf"corpus\{suffix}: no such file"):
        IndexedReader(prefix)


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_an_empty_corpus_is_refused(tmp_path, documents):
    with pytest.raises(InputError, match="corpus is empty"):
        IndexedReader(write(tmp_path / "x", documents))


def test_tokens_outside_the_vocabulary_are_found(tmp_path, prefix):
    IndexedReader(prefix).check_vocab(11)
    with pytest.raises(InputError, match=r"holds token 10 but the vocabulary has 10.*at least 11"):
        IndexedReader(prefix).check_vocab(10)
    with pytest.raises(InputError, match="negative token -1"):
        IndexedReader(write(tmp_path / "negative", [[1, -1]], np.int32)).check_vocab(10)


def test_checks_reach_across_the_pieces_they_are_made_in(prefix, monkeypatch):
    monkeypatch.setattr(indexed, "SCAN", 2)
    IndexedReader(prefix).check_vocab(11)
    path = indexed.index_path(prefix)
    sound = path.read_bytes()
    for damage in (entry("<q", POINTERS + 16, 2), entry("<q", BOUNDS + 16, 0), entry("<i", LENGTHS + 8, -1)):
        path.write_bytes(damage(sound))
        with pytest.raises(InputError):
            IndexedReader(prefix)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail():
        with IndexedWriter(tmp_path / "x", np.uint16) as writer:
            writer.add_document(np.array([1, 2]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_its_final_name_before_it_is_complete(tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(np.array([1, 2]))
        assert not (tmp_path / "x.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]
