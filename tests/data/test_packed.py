"""Samples laid end to end: what is learned, what is compared, and where each sequence starts and ends."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm3d.data.packed import PackedBatch, chosen_targets, collate, with_noise
from llm3d.data.samples import Sample, Tokens

IGNORED = -100


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    made: list[Sample] = []
    for _ in range(draw(st.integers(0, 4))):
        sequences = []
        for _ in range(draw(st.integers(1, 4))):
            target = draw(st.lists(st.booleans(), min_size=2, max_size=9))
            ids = draw(st.lists(st.integers(0, 99), min_size=len(target), max_size=len(target)))
            sequences.append(Tokens(np.array(ids, np.int32), np.array(target)))
        ranks = draw(
            st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=len(sequences), max_size=len(sequences))
        )
        made.append(Sample(tuple(sequences), tuple(ranks), float(len(made))))
    return made


def sequences_of(made: list[Sample]) -> list[Tokens]:
    return [sequence for sample in made for sequence in sample.sequences]


def spans(batch: PackedBatch) -> list[slice]:
    """Of each sequence, without padding."""
    return [slice(a, b) for a, b in pairwise(batch.cu_seqlens.tolist())][: batch.num_sequences]


@given(samples(), st.integers(1, 5))
def test_each_token_learns_the_next_of_its_own_sequence_where_that_is_a_target(
    made: list[Sample], multiple: int
) -> None:
    batch = collate(made, multiple)
    expected_spans = spans(batch)
    assert len(expected_spans) == len(sequences_of(made))
    learned = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for span, (ids, is_target) in zip(expected_spans, sequences_of(made), strict=True):
        assert batch.tokens[span].tolist() == ids.tolist()
        expected = [int(i) if t else IGNORED for i, t in zip(ids[1:], is_target[1:], strict=True)]
        assert batch.targets[span].tolist() == [*expected, IGNORED], "nothing is learned across sequences"
        learned[span] = batch.targets[span] != IGNORED
    assert (batch.targets[~learned] == IGNORED).all(), "padding is not learned"
    assert batch.num_targets == int(learned.sum()) and batch.num_samples == len(made)


@given(samples(), st.integers(1, 5))
def test_padding_is_a_segment_of_its_own_and_the_least_there_can_be(
    made: list[Sample], multiple: int
) -> None:
    batch = collate(made, multiple)
    num_tokens = sum(len(ids) for ids, _ in sequences_of(made))
    padding = len(batch.tokens) - num_tokens
    assert len(batch.tokens) % multiple == 0
    assert padding == (-num_tokens % multiple if made else multiple)
    bounds = batch.cu_seqlens.tolist()
    assert bounds == [0, *np.cumsum([len(ids) for ids, _ in sequences_of(made)]).tolist()] + [
        len(batch.tokens)
    ] * (padding > 0)
    assert batch.max_seqlen == max(b - a for a, b in pairwise(bounds))


@given(samples(), st.integers(1, 5))
def test_every_token_knows_its_sequence_and_every_sequence_its_last_token(
    made: list[Sample], multiple: int
) -> None:
    batch = collate(made, multiple)
    for number, span in enumerate(spans(batch)):
        assert set(batch.sequence_of[span].tolist()) == {number}
        assert batch.last_tokens[number] == span.stop - 1
    padding = batch.sequence_of[batch.last_tokens[-1] + 1 :] if made else batch.sequence_of
    assert set(padding.tolist()) <= {max(0, batch.num_sequences - 1)}


@given(samples())
def test_all_pairs_that_differ_in_rank_are_compared_and_those_of_a_sample_weigh_one(
    made: list[Sample],
) -> None:
    batch = collate(made)
    owner = [number for number, sample in enumerate(made) for _ in sample.sequences]
    ranks = [rank for sample in made for rank in sample.ranks]
    expected = {
        (i, j)
        for i in range(len(ranks))
        for j in range(len(ranks))
        if owner[i] == owner[j] and ranks[i] < ranks[j]
    }
    pairs = list(zip(batch.better.tolist(), batch.worse.tolist(), strict=True))
    assert len(pairs) == len(expected) and set(pairs) == expected
    weights: dict[int, float] = {}
    for (better, _), weight, margin in zip(
        pairs, batch.pair_weights.tolist(), batch.margins.tolist(), strict=True
    ):
        weights[owner[better]] = weights.get(owner[better], 0.0) + weight
        assert margin == made[owner[better]].margin
    assert weights.keys() == {owner[better] for better, _ in expected}
    assert list(weights.values()) == pytest.approx([1.0] * len(weights))
    by_hand = sum(
        weight * int((batch.targets[spans(batch)[better]] != IGNORED).sum())
        for (better, _), weight in zip(pairs, batch.pair_weights.tolist(), strict=True)
    )
    assert chosen_targets(made) == pytest.approx(by_hand)


@given(samples(), st.integers(1, 5))
def test_no_two_tokens_draw_by_one_key_and_padding_moves_none(made: list[Sample], multiple: int) -> None:
    keys = [12345 + 977 * i for i in range(len(sequences_of(made)))]
    batch = with_noise(collate(made, multiple), keys, 2.0)
    alone = with_noise(collate(made), keys, 2.0)
    assert batch.keys is not None and alone.keys is not None
    num_tokens = sum(len(ids) for ids, _ in sequences_of(made))
    assert len(set(batch.keys[:num_tokens].tolist())) == num_tokens
    assert torch.equal(batch.keys[:num_tokens], alone.keys[:num_tokens])
    assert batch.noise is not None
    for span in spans(batch):
        assert batch.noise[span].tolist() == pytest.approx(
            [2.0 / (span.stop - span.start) ** 0.5] * (span.stop - span.start)
        )
