"""Samples are the stored tokens in the stated order, and no target crosses the end of a document."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3d.corpus.indexed import IndexedWriter
from llm3d.data.pretraining import IGNORED, PretrainingData, Window, collate
from llm3d.errors import InputError


def write(prefix, lengths):
    """Documents of the given lengths over the tokens 0, 1, 2, ..."""
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.arange(sum(lengths)), np.array(lengths))
    return str(prefix)


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "train", [7, 1, 30, 2, 2, 50, 8])


def open_data(*paths, length=8, seed=1, vocab_size=1000, **options):
    return PretrainingData([(path, 1.0) for path in paths], length, seed, vocab_size, **options)


def test_an_epoch_sees_every_window_once_and_the_next_in_another_order(corpus):
    data = open_data(corpus)
    assert data.num_windows == 100 // 8
    epochs = [[int(data.sample(k).tokens[0]) for k in range(12 * e, 12 * e + 12)] for e in range(3)]
    assert all(sorted(epoch) == list(range(0, 96, 8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_windows_are_the_stored_tokens_and_overlap_by_one(corpus):
    data = open_data(corpus)
    windows = [data.window(i).tokens for i in range(data.num_windows)]
    assert torch.cat([w[:-1] for w in windows]).tolist() == list(range(96))
    assert all(w.dtype == torch.int64 and len(w) == 9 for w in windows)


def test_samples_depend_on_nothing_but_their_number(tmp_path, corpus):
    other = write(tmp_path / "other", [40, 60])
    first, second = open_data(corpus, other), open_data(corpus, other)
    backwards = [second.sample(k).tokens.tolist() for k in reversed(range(50))]
    assert [first.sample(k).tokens.tolist() for k in range(50)] == backwards[::-1]
    assert first.digest == second.digest != open_data(corpus, other, seed=2).digest
    assert first.epochs(24) == [1.0, 1.0]


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20), micro=st.integers(1, 4))
def test_microbatches_keep_documents_apart(tmp_path_factory, lengths, micro):
    lengths = [*lengths, 9]
    data = open_data(write(tmp_path_factory.mktemp("corpus") / "x", lengths))
    samples = [data.sample(k) for k in range(micro)]
    batch = collate(samples)
    document = np.repeat(np.arange(len(lengths)), lengths)  # of each token, which is its own position
    tokens, targets, cu = batch.tokens.tolist(), batch.targets.tolist(), batch.cu_seqlens.tolist()
    assert len(tokens) == 8 * micro
    for i, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        same = token + 1 < len(document) and document[token] == document[token + 1]
        assert target == (token + 1 if same else IGNORED)
        new = i % 8 == 0 or document[token] != document[token - 1]
        assert (i in cu) == new
    assert (cu[0], cu[-1]) == (0, 8 * micro)
    assert batch.max_seqlen == max(np.diff(cu))
    assert batch.num_targets == sum(target != IGNORED for target in targets)
    dtypes = (batch.tokens.dtype, batch.targets.dtype, batch.cu_seqlens.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int32)


def test_documents_need_not_be_kept_apart(corpus):
    batch = collate([open_data(corpus, split_documents=False).sample(k) for k in range(3)])
    assert batch.cu_seqlens.tolist() == [0, 8, 16, 24]
    assert batch.targets.tolist() == [token + 1 for token in batch.tokens.tolist()]
    assert batch.num_targets == 24


def test_collating_changes_no_sample():
    sample = Window(torch.arange(5), [0, 2])
    assert collate([sample, sample]).targets.tolist() == [1, IGNORED, 3, 4] * 2
    assert sample.tokens.tolist() == [0, 1, 2, 3, 4]
    assert collate([sample]).to("cpu").num_targets == 3


def test_a_directory_stands_for_its_split(tmp_path, corpus):
    write(tmp_path / "valid", [20])
    assert open_data(str(tmp_path)).num_windows == 12
    assert open_data(str(tmp_path), split="valid").num_windows == 2
    assert open_data(f"{corpus}.bin").num_windows == 12


def test_what_cannot_be_trained_on_is_refused(tmp_path, corpus):
    with pytest.raises(InputError, match=r"100 tokens, fewer than one sample .* = 101; lower"):
        open_data(corpus, length=100)
    assert open_data(corpus, length=99).num_windows == 1
    with pytest.raises(InputError, match=r"none.idx: no such file"):
        open_data(str(tmp_path / "none"))
    with pytest.raises(InputError, match="holds token 99 but the vocabulary has 99"):
        open_data(corpus, vocab_size=99)
    with pytest.raises(InputError, match="no data sources"):
        open_data()
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="is not a positive number"):
            PretrainingData([(corpus, weight)], 8, 1, 100)


def test_a_large_source_is_checked_as_it_is_read(corpus, monkeypatch):
    monkeypatch.setattr("llm3d.data.pretraining.FULL_SCAN", 10)
    data = open_data(corpus, vocab_size=90)
    with pytest.raises(InputError, match="but the vocabulary has 90"):
        [data.window(i) for i in range(12)]
