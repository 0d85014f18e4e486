"""A sample that is too long is left out, or cut alike for all its replies; what is stored comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llm3d.data.samples import Sample, SampleSet, Tokens, fitted, why_useless

BOS = 7


@st.composite
def samples(draw: st.DrawFn, bos: bool | None = None) -> Sample:
    """A prompt with one to three replies; no two tokens of the prompt and a reply are the same."""
    starts_with_bos = draw(st.booleans()) if bos is None else bos
    prompt = [BOS] * starts_with_bos + list(range(100, 100 + draw(st.integers(1, 8))))
    replies = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    sequences = []
    for number, length in enumerate(replies):
        ids = prompt + list(range(1000 * (number + 1), 1000 * (number + 1) + length))
        sequences.append(Tokens(np.array(ids, np.int32), np.arange(len(ids)) >= len(prompt)))
    ranks = tuple(float(rank) for rank in range(len(replies)))
    return Sample(tuple(sequences), ranks, float(np.float32(draw(st.floats(0, 9)))))


def as_lists(sample: Sample) -> tuple:
    sequences = [(ids.tolist(), target.tolist()) for ids, target in sample.sequences]
    return sequences, sample.ranks, sample.margin


def prompt_of(tokens: Tokens) -> list[int]:
    return tokens.ids[~tokens.is_target].tolist()


def reply_of(tokens: Tokens) -> list[int]:
    return tokens.ids[tokens.is_target].tolist()


@given(st.lists(samples(), max_size=5))
def test_samples_come_back_as_they_were_stored(stored: list[Sample]) -> None:
    found = SampleSet.of(stored)
    assert len(found) == len(stored)
    assert [as_lists(found[i]) for i in range(len(stored))] == [as_lists(sample) for sample in stored]
    assert found.num_sequences == sum(len(sample.sequences) for sample in stored)
    assert found.lengths.tolist() == [sum(len(ids) for ids, _ in sample.sequences) for sample in stored]


@given(st.lists(samples(), min_size=1, max_size=4), st.data())
def test_the_digest_tells_sets_apart(stored: list[Sample], data: st.DataObject) -> None:
    assert SampleSet.of(stored).digest == SampleSet.of(stored).digest
    number = data.draw(st.integers(0, len(stored) - 1))
    sample = stored[number]
    (ids, target), *rest = sample.sequences
    changes = [
        sample._replace(margin=sample.margin + 1),
        sample._replace(ranks=tuple(rank + 1 for rank in sample.ranks)),
        sample._replace(sequences=(Tokens(ids + 1, target), *rest)),
        sample._replace(sequences=(Tokens(ids, ~target), *rest)),
    ]
    for changed in changes:
        assert (
            SampleSet.of([*stored[:number], changed, *stored[number + 1 :]]).digest
            != SampleSet.of(stored).digest
        )


@given(samples(), st.sampled_from(["drop", "left", "right"]))
def test_what_fits_is_not_touched(sample: Sample, truncation: str) -> None:
    longest = max(len(ids) for ids, _ in sample.sequences)
    assert fitted(sample, longest, truncation, BOS) is sample


@given(samples(), st.integers(1, 20), st.sampled_from(["drop", "left", "right"]))
def test_what_is_cut_fits_and_has_something_to_learn_in_every_sequence(
    sample: Sample, limit: int, truncation: str
) -> None:
    assume(max(len(ids) for ids, _ in sample.sequences) > limit)
    if truncation == "drop":
        assert fitted(sample, limit, truncation, BOS) is None
        return
    cut = fitted(sample, limit, truncation, BOS)
    if cut is None:
        return  # nothing would be left to learn: below
    assert (cut.ranks, cut.margin) == (sample.ranks, sample.margin)
    assert max(len(ids) for ids, _ in cut.sequences) <= limit
    # A sequence's first token follows nothing, and so cannot be learned.
    assert all(target[1:].any() for _, target in cut.sequences)


@given(samples(), st.integers(1, 20))
def test_cutting_at_the_right_keeps_a_prefix(sample: Sample, limit: int) -> None:
    assume(max(len(ids) for ids, _ in sample.sequences) > limit)
    cut = fitted(sample, limit, "right", BOS)
    if cut is None:
        assert any(len(prompt_of(sequence)) >= limit for sequence in sample.sequences)
        return
    for before, after in zip(sample.sequences, cut.sequences, strict=True):
        assert after.ids.tolist() == before.ids.tolist()[:limit]
        assert after.is_target.tolist() == before.is_target.tolist()[:limit]


@pytest.mark.parametrize("bos", [True, False])
@given(st.data())
def test_cutting_at_the_left_keeps_bos_the_replies_and_one_prompt(bos: bool, data: st.DataObject) -> None:
    sample = data.draw(samples(bos=bos))
    longest = max(len(ids) for ids, _ in sample.sequences)
    spare = len(prompt_of(sample.sequences[0])) - 1  # what can go before the prompt is one token
    limit = data.draw(st.integers(longest - spare, longest))
    cut = fitted(sample, limit, "left", BOS if bos else None)
    assert cut is not None
    assert [reply_of(sequence) for sequence in cut.sequences] == [
        reply_of(sequence) for sequence in sample.sequences
    ]
    prompts = [prompt_of(sequence) for sequence in cut.sequences]
    whole = prompt_of(sample.sequences[0])
    kept = limit - longest + len(whole)
    assert prompts == [whole[:1] * bos + whole[len(whole) - kept + bos :]] * len(prompts)


def test_a_sample_that_a_cut_leaves_without_a_reply_is_too_long() -> None:
    """Of the shorter reply one token would be left, the first of its sequence."""
    short, long = ([1, 2, 3, 4, 5], [1, 2, 3, *range(50, 60)])
    sequences = tuple(Tokens(np.array(ids, np.int32), np.arange(len(ids)) >= 3) for ids in (short, long))
    sample = Sample(sequences, (0.0, 1.0))
    assert fitted(sample, len(long) - 3, "left", None) is not None
    for excess in (4, 5, 6):
        assert fitted(sample, len(long) - excess, "left", None) is None


def test_replies_that_a_cut_makes_the_same_are_too_long() -> None:
    sequences = tuple(Tokens(np.array([1, 2, 3, 4, last], np.int32), np.arange(5) >= 2) for last in (5, 6))
    sample = Sample(sequences, (0.0, 1.0))
    assert why_useless(sample.sequences) is None
    assert fitted(sample, 4, "right", None) is None and fitted(sample, 4, "left", None) is not None
