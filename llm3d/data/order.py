"""The order of pretraining samples as a pure function of the sample's number.

Global sample k belongs to a source by a fixed blend, to a place in an epoch of that source, and to a window
of its tokens by a keyed permutation of that epoch. No index is built or stored, every rank computes the same,
and neither the length of the run nor the layout enters.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from llm3d.permutation import IntOrArray, derive_key, permute

CYCLE = 1 << 16


class Blend:
    """Which source each sample comes from, in proportion to weights.

    weights: positive, any scale. They are rounded to parts in 65,536 (largest remainder, at least one part
    each; `.weights` says what they became), and a fixed cycle of 65,536 samples is repeated. After any k
    samples every source has been drawn k * weight times, give or take less than one: within the cycle the
    j-th draw of a source with weight w falls in slots [floor((j - 1) / w), ceil(j / w)), earliest deadline
    first, which is always possible (proportionate fairness, Baruah et al. 1996).
    """

    def __init__(self, weights: Sequence[float]):
        assert all(w > 0 and math.isfinite(w) for w in weights), weights
        self._counts = _apportion(weights, CYCLE)
        self._sources = _lay_out(tuple(self._counts.tolist()))
        self._ranks = np.empty(CYCLE, dtype=np.int64)  # how often the slot's source came earlier in the cycle
        for source, count in enumerate(self._counts):
            self._ranks[self._sources == source] = np.arange(count)

    @property
    def weights(self) -> list[float]:
        """The share of each source, as rounded; sums to 1."""
        return [float(count) / CYCLE for count in self._counts]

    def source_and_index(self, k: IntOrArray) -> tuple[IntOrArray, IntOrArray]:
        """The source of global sample k, and how many earlier samples it gave. Ints, or int arrays."""
        cycle, slot = k // CYCLE, k % CYCLE
        source = self._sources[slot]
        index = cycle * self._counts[source] + self._ranks[slot]
        return (source, index) if isinstance(k, np.ndarray) else (int(source), int(index))


def _apportion(weights: Sequence[float], parts: int) -> np.ndarray:
    """Whole parts that sum to `parts`, by largest remainder, none zero."""
    assert len(weights) <= parts, f"{len(weights)} sources; a blend holds at most {parts}"
    exact = np.array(weights, dtype=np.float64)
    exact = exact / exact.sum() * parts
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() != parts:
        if counts.sum() < parts:
            counts[np.argmax(exact - counts)] += 1
        else:
            counts[np.argmin(np.where(counts > 1, exact - counts, np.inf))] -= 1
    return counts


@lru_cache(maxsize=16)
def _lay_out(counts: tuple[int, ...]) -> np.ndarray:
    """The source of each slot of the cycle. int64 [sum of counts]."""
    parts = sum(counts)
    waiting = [(0, _deadline(1, count, parts), source, 1) for source, count in enumerate(counts)]
    heapq.heapify(waiting)  # by the slot at which the draw may first happen
    ready: list[tuple[int, int, int]] = []  # by the slot before which it must have happened
    layout = np.empty(parts, dtype=np.int64)
    for slot in range(parts):
        while waiting and waiting[0][0] <= slot:
            _, deadline, source, draw = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, source, draw))
        _, source, draw = heapq.heappop(ready)
        layout[slot] = source
        count = counts[source]
        if draw < count:
            release = draw * parts // count
            heapq.heappush(waiting, (release, _deadline(draw + 1, count, parts), source, draw + 1))
    return layout


def _deadline(draw: int, count: int, parts: int) -> int:
    return -(-draw * parts // count)


def held_out(rows: np.ndarray, share: float, seed: int, source: int) -> np.ndarray:
    """bool [samples]: which samples of a source are kept for validation: those of about that share of its rows.

    rows: int [samples], the row of its file that each was made of. All samples of a row are on the same side; at
    least one row is kept, and never all.
    """
    unique_rows, row_of_sample = np.unique(rows, return_inverse=True)
    size = len(unique_rows)
    places = permute(np.arange(size), size, derive_key(seed, source, -1))  # epochs have keys from 0 on
    return (places < min(max(1, round(share * size)), size - 1))[row_of_sample]


class SampleOrder:
    """Which sample of which source global sample k is, without end: each epoch of a source in an order of its own.

    weights: of the sources in the blend.  sizes: how many samples each has.
    """

    def __init__(self, weights: Sequence[float], sizes: Sequence[int], seed: int) -> None:
        self.weights, self.sizes, self.seed = weights, sizes, seed

    @classmethod
    def by_sample(cls, weights: Sequence[float], sizes: Sequence[int], seed: int) -> SampleOrder:
        """weights: of each sample of a source."""
        return cls([w * n for w, n in zip(weights, sizes, strict=True)], sizes, seed)

    @cached_property
    def blend(self) -> Blend:
        return Blend(self.weights)

    @property
    def samples_a_pass(self) -> float:
        """Samples in one pass over the data, where weights are of samples."""
        return sum(self.weights)

    def place(self, k: int) -> tuple[int, int]:
        """Of global sample k: its source, and its number there."""
        source, _, index = sample_window(k, self.blend, self.sizes, self.seed)
        return source, index


def short_digest(described: Any) -> str:
    """16 hex digits of what is described, JSON."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def sample_window(k: int, blend: Blend, windows_per_source: Sequence[int], seed: int) -> tuple[int, int, int]:
    """Global sample k as (source, epoch, window): each epoch of a source visits each of its windows once."""
    source, index = blend.source_and_index(k)
    size = windows_per_source[source]
    epoch, place = divmod(index, size)
    return source, epoch, permute(place, size, derive_key(seed, source, epoch))


def order_digest(
    num_tokens: Sequence[int],
    num_documents: Sequence[int],
    weights: Sequence[float],
    sequence_length: int,
    seed: int,
) -> str:
    """16 hex digits that change when the order of samples, or the data under it, changes.

    A checkpoint keeps it, and compares on resume. num_tokens, num_documents, weights: one entry a source.
    """
    described = {
        "order": "feistel8-splitmix64/pfair65536/v1",
        "num_tokens": [int(n) for n in num_tokens],
        "num_documents": [int(n) for n in num_documents],
        "weights": Blend(weights).weights,
        "sequence_length": int(sequence_length),
        "seed": int(seed),
    }
    return short_digest(described)
