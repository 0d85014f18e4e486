"""Which samples a data rank reads, as microbatches: for a training step, and for a pass over validation data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llm3d.data.pretraining import IGNORED, Microbatch, PretrainingData, collate


def step_microbatches(
    data: PretrainingData, first_sample: int, global_batch: int, micro: int, data_rank: int, data_size: int
) -> list[Microbatch]:
    """This data rank's share of a step that takes global samples first_sample and on, in their order."""
    share = global_batch // data_size
    first = first_sample + data_rank * share
    return [
        collate([data.sample(k) for k in range(start, start + micro)])
        for start in range(first, first + share, micro)
    ]


def evaluation_batches(
    data: PretrainingData, num_samples: int, micro: int, data_rank: int, data_size: int, at_once: int
) -> Iterator[list[Microbatch]]:
    """Lists of `at_once` microbatches that together hold windows 0 .. num_samples - 1 once, over all data ranks.

    Every data rank gets the same number of microbatches, of the same size; what is beyond num_samples is filled
    with samples without targets.
    """
    windows_at_once = at_once * micro * data_size
    for start in range(0, num_samples, windows_at_once):
        first = start + data_rank * micro
        yield [
            _microbatch(data, first + i * micro * data_size, micro, num_samples)
            for i in range(-(-min(windows_at_once, num_samples - start) // (micro * data_size)))
        ]


def _microbatch(data: PretrainingData, first: int, micro: int, num_samples: int) -> Microbatch:
    batch = collate([data.window(min(index, num_samples - 1)) for index in range(first, first + micro)])
    beyond = max(0, min(micro, first + micro - num_samples))
    if beyond:
        batch.targets[(micro - beyond) * data.sequence_length :] = IGNORED
        return replace(batch, num_targets=int((batch.targets != IGNORED).sum()))
    return batch
