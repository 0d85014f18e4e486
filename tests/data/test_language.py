"""The data ranks of any layout share a step's samples, and a pass over the validation data, without gap or overlap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from llm3d.data.language import evaluation_batches, step_microbatches
from llm3d.data.pretraining import Window

LENGTH = 3
small = st.integers(1, 5)


def numbered(count: int) -> Any:
    """Data whose sample, and window, number k holds k and nothing else."""

    def sample(k: int) -> Window:
        assert 0 <= k < count
        return Window(torch.full((LENGTH + 1,), k), [0])

    return SimpleNamespace(sample=sample, window=sample, sequence_length=LENGTH)


@given(small, small, small, st.integers(1, 4))
def test_a_step_is_shared_in_order(micro: int, per_rank: int, data_size: int, step: int) -> None:
    global_batch = micro * per_rank * data_size
    data = numbered(step * global_batch)
    first = (step - 1) * global_batch
    ranks = [
        step_microbatches(data, first, global_batch, micro, rank, data_size) for rank in range(data_size)
    ]
    assert all(len(batch.tokens) == micro * LENGTH for rank in ranks for batch in rank)
    seen = [int(k) for rank in ranks for batch in rank for k in batch.tokens[::LENGTH]]
    assert seen == list(range((step - 1) * global_batch, step * global_batch))


@given(st.integers(1, 40), small, small, small)
def test_an_evaluation_counts_every_window_once(
    num_samples: int, micro: int, data_size: int, at_once: int
) -> None:
    data = numbered(num_samples)
    ranks = [
        list(evaluation_batches(data, num_samples, micro, rank, data_size, at_once))
        for rank in range(data_size)
    ]
    shapes = [[[len(batch.tokens) for batch in batches] for batches in rank] for rank in ranks]
    assert all(shape == shapes[0] for shape in shapes), "ranks go through the same forward passes"
    assert all(len(batches) <= at_once for batches in shapes[0])
    assert {size for batches in shapes[0] for size in batches} == {micro * LENGTH}
    for batch in (batch for rank in ranks for batches in rank for batch in batches):
        assert batch.num_targets == int((batch.targets >= 0).sum())
    targets = torch.cat([batch.targets for rank in ranks for batches in rank for batch in batches])
    assert sorted(targets[targets >= 0].tolist()) == sorted(list(range(num_samples)) * LENGTH)
    # No more is read than the last round of microbatches needs to be full.
    total = sum(map(len, shapes[0])) * micro * data_size
    assert total - num_samples < micro * data_size
