"""Packs samples into bins of at most so many tokens: few bins, evenly filled.

What comes out depends on the lengths and the numbers of the samples alone. Samples are placed by C++ (csrc/packing)
where installing llm3d built it, else by the same algorithm in Python, slower.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def pack(lengths: Ints, capacity: int, multiple_of: int = 1) -> list[Ints]:
    """The samples of each bin, their numbers ascending; every sample is in one bin.

    lengths: int64 [n], each from 1 to capacity, else ValueError.

    There are as many bins as first-fit-decreasing needs (at most 11/9 of the fewest possible, plus one), rounded
    up to a multiple of `multiple_of`. How full the fullest is, at most capacity, is found by MULTIFIT (Coffman, Garey
    and Johnson 1978): a binary search for the least capacity with which first-fit-decreasing needs no more bins than
    these. A bin is empty only where there are fewer samples than bins.
    """
    order = _longest_first(lengths, capacity)
    if not len(order):
        return []
    descending = lengths[order]
    bins = first_fit(descending, capacity)
    num_bins = -(-_count(bins) // multiple_of) * multiple_of
    least, most = max(int(descending[0]), -(-int(lengths.sum()) // num_bins)), capacity
    while least < most:
        middle = (least + most) // 2
        tried = first_fit(descending, middle)
        if _count(tried) <= num_bins:
            bins, most = tried, middle
        else:
            least = middle + 1
    packed = _samples_of_each(_in_order(bins, order))
    return packed if len(packed) == num_bins else _fill_empty(packed, lengths, num_bins)


def first_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The bin of each sample: the longest goes first, each into the first bin that has room for it.

    lengths: int64 [n], each from 1 to capacity, else ValueError  ->  int64 [n]. Bins are numbered as they are opened.
    Of two samples of one length, the one with the smaller number goes first.
    """
    order = _longest_first(lengths, capacity)
    return _in_order(first_fit(lengths[order], capacity), order)


def unused_share(lengths: Ints, packed: Sequence[Ints]) -> float:
    """How much is padding when every bin gets the shape of the fullest, from 0 to 1."""
    if not packed:
        return 0.0
    return 1 - int(lengths.sum()) / (len(packed) * int(tokens(lengths, packed).max()))


def tokens(lengths: Ints, packed: Sequence[Ints]) -> Ints:
    """How full each bin is: int64 [number of bins]."""
    if not packed:
        return np.empty(0, np.int64)
    bins = np.repeat(np.arange(len(packed)), [len(samples) for samples in packed])
    sums = np.bincount(bins, weights=lengths[np.concatenate(packed)], minlength=len(packed))
    return sums.astype(np.int64)  # exact, below 2^53


def _longest_first(lengths: Ints, capacity: int) -> Ints:
    assert lengths.dtype == np.int64 and lengths.ndim == 1, (lengths.dtype, lengths.shape)
    assert capacity >= 1, capacity
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(wrong):
        raise ValueError(
            f"sample {wrong[0]} has {lengths[wrong[0]]} tokens, a bin holds 1 to {capacity}; "
            f"{len(wrong)} of {len(lengths)} samples do not fit"
        )
    small = np.min_scalar_type(capacity)  # of two bytes at most: numpy sorts by digits, several times as fast
    return np.argsort((capacity - lengths).astype(small), kind="stable")


def _count(bins: Ints) -> int:
    return int(bins.max()) + 1


def _in_order(bins: Ints, order: Ints) -> Ints:
    """The bin of each sample, from the bins in the order in which samples were placed."""
    result = np.empty_like(bins)
    result[order] = bins
    return result


def _samples_of_each(bins: Ints) -> list[Ints]:
    samples = np.argsort(bins, kind="stable")
    ends = np.cumsum(np.bincount(bins)).tolist()
    return [samples[begin:end] for begin, end in pairwise([0, *ends])]


def _fill_empty(packed: list[Ints], lengths: Ints, num_bins: int) -> list[Ints]:
    """Each missing bin gets every second sample, by length, of the fullest bin that can give one."""
    packed = list(packed)
    givers = [
        (-size, number)
        for number, size in enumerate(tokens(lengths, packed).tolist())
        if len(packed[number]) > 1
    ]
    heapq.heapify(givers)
    while givers and len(packed) < num_bins:
        _, number = heapq.heappop(givers)
        samples = packed[number]
        longest_first = samples[np.argsort(-lengths[samples], kind="stable")]
        packed[number] = np.sort(longest_first[::2])
        packed.append(np.sort(longest_first[1::2]))
        for half in (number, len(packed) - 1):
            if len(packed[half]) > 1:
                heapq.heappush(givers, (-int(lengths[packed[half]].sum()), half))
    return packed + [np.empty(0, np.int64) for _ in range(num_bins - len(packed))]


def first_fit_in_python(lengths: Ints, capacity: int) -> Ints:
    """The bin of each sample, placed in the order given. What csrc/packing/first_fit.cpp does, and how."""
    num_leaves = 1 << (min(len(lengths), 2 * int(lengths.sum()) // capacity + 1) - 1).bit_length()
    rooms = [capacity] * (2 * num_leaves)
    waiting, bins = lengths.tolist(), list[int]()
    while len(bins) < len(waiting):
        length, node = waiting[len(bins)], 1
        while node < num_leaves:
            node *= 2
            node += rooms[node] < length
        while len(bins) < len(waiting) and waiting[len(bins)] == length <= rooms[node]:
            bins.append(node - num_leaves)
            rooms[node] -= length
        node //= 2
        while node and rooms[node] != (largest := max(rooms[2 * node], rooms[2 * node + 1])):
            rooms[node] = largest
            node //= 2
    return np.array(bins, np.int64)


try:
    from llm3d.data._packing import first_fit
except ModuleNotFoundError:  # it was not built here
    first_fit = first_fit_in_python
