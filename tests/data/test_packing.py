"""Every sample is in one bin, no bin holds too much, there are few of them, and they are even."""

from __future__ import annotations

import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3d.data import packing
from llm3d.data.packing import Ints, first_fit_decreasing, first_fit_in_python, pack, tokens, unused_share

Placing = Callable[[Ints, int], Ints]

PROPERTIES = settings(max_examples=300)
NATIVE = pytest.mark.skipif(
    packing.first_fit is first_fit_in_python,
    reason="llm3d.data._packing is not there; installing llm3d builds it where there is a C++ compiler",
)
EACH_PLACING = pytest.mark.parametrize(
    "first_fit",
    [
        pytest.param(packing.first_fit, marks=NATIVE, id="native"),
        pytest.param(first_fit_in_python, id="Python"),
    ],
)


@st.composite
def samples(draw: st.DrawFn, most: int = 60) -> tuple[Ints, int]:
    """Lengths, many of them equal, and a capacity."""
    capacity = draw(st.integers(1, 40) | st.integers(1, 1 << 20))
    lengths = draw(st.lists(st.integers(1, capacity) | st.sampled_from([capacity, 1]), max_size=most))
    return np.array(lengths, np.int64), capacity


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying every way."""
    best = len(lengths)

    def place(index: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for number in {room: number for number, room in enumerate(rooms) if room >= lengths[index]}.values():
            rooms[number] -= lengths[index]
            place(index + 1, rooms)
            rooms[number] += lengths[index]
        place(index + 1, [*rooms, capacity - lengths[index]])

    place(0, [])
    return best


def one_by_one(lengths: Ints, capacity: int) -> list[int]:
    """First fit in its own words."""
    rooms, bins = list[int](), []
    for length in lengths.tolist():
        fitting = (number for number, room in enumerate(rooms) if room >= length)
        number = next(fitting, len(rooms))
        if number == len(rooms):
            rooms.append(capacity)
        rooms[number] -= length
        bins.append(number)
    return bins


@EACH_PLACING
@PROPERTIES
@given(samples())
def test_each_sample_goes_into_the_first_bin_with_room(first_fit: Placing, given: tuple[Ints, int]) -> None:
    bins = first_fit(*given)
    assert bins.dtype == np.int64
    assert bins.tolist() == one_by_one(*given)


@NATIVE
@pytest.mark.parametrize("capacity", [7, 4096, 1 << 40])
def test_native_and_python_agree_on_many(capacity: int) -> None:
    lengths = np.random.default_rng(capacity).integers(1, capacity, 30_000, endpoint=True)
    for ordered in (lengths, np.sort(lengths), np.sort(lengths)[::-1].copy()):
        native, in_python = packing.first_fit(ordered, capacity), first_fit_in_python(ordered, capacity)
        np.testing.assert_array_equal(native, in_python)


@PROPERTIES
@given(samples())
def test_decreasing_is_first_fit_of_the_longest_first(given: tuple[Ints, int]) -> None:
    lengths, capacity = given
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    assert first_fit_decreasing(lengths, capacity)[order].tolist() == one_by_one(lengths[order], capacity)


@PROPERTIES
@given(samples(most=9))
def test_there_are_few_bins(given: tuple[Ints, int]) -> None:
    lengths, capacity = given
    fewest = fewest_bins(lengths.tolist(), capacity)
    assert fewest <= len(pack(lengths, capacity)) <= (11 * fewest + 6) / 9  # Dosa 2007


@PROPERTIES
@given(samples(), st.integers(1, 9))
def test_every_sample_is_in_one_bin_and_no_bin_holds_too_much(
    given: tuple[Ints, int], multiple_of: int
) -> None:
    lengths, capacity = given
    packed = pack(lengths, capacity, multiple_of)
    assert sorted(np.concatenate([*packed, np.empty(0, np.int64)]).tolist()) == list(range(len(lengths)))
    assert all(inside.dtype == np.int64 and (np.diff(inside) > 0).all() for inside in packed)
    assert all(lengths[inside].sum() <= capacity for inside in packed)


@PROPERTIES
@given(samples(), st.integers(1, 9))
def test_the_number_of_bins_is_first_fit_decreasing_rounded_up(
    given: tuple[Ints, int], multiple_of: int
) -> None:
    lengths, capacity = given
    needed = len(set(first_fit_decreasing(lengths, capacity).tolist()))
    packed = pack(lengths, capacity, multiple_of)
    assert len(packed) % multiple_of == 0
    assert needed <= len(packed) < needed + multiple_of
    assert sum(len(inside) == 0 for inside in packed) == max(0, len(packed) - len(lengths))


@PROPERTIES
@given(samples(), st.integers(1, 9))
def test_the_fullest_bin_is_no_fuller_than_that_of_first_fit_decreasing(
    given: tuple[Ints, int], multiple_of: int
) -> None:
    lengths, capacity = given
    bins = first_fit_decreasing(lengths, capacity)
    fullest = max(np.bincount(bins, weights=lengths), default=0)
    assert max(tokens(lengths, pack(lengths, capacity, multiple_of)), default=0) <= fullest


@given(samples(most=8), st.integers(1, 4))
def test_the_fullest_bin_is_near_the_least_for_so_many_bins(
    given: tuple[Ints, int], multiple_of: int
) -> None:
    lengths, capacity = given
    packed = pack(lengths, capacity, multiple_of)
    if not packed:
        return
    capacities = range(lengths.max(), capacity + 1)
    enough = bisect_left(capacities, True, key=lambda c: fewest_bins(lengths.tolist(), c) <= len(packed))
    assert tokens(lengths, packed).max() <= -(-13 * capacities[enough] // 11)  # Yue 1990


@given(samples(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_bins_hold_the_same_lengths_whatever_the_order_of_samples(given, multiple_of, random) -> None:
    lengths, capacity = given
    shuffled = lengths.copy()
    random.shuffle(shuffled)
    first, second = pack(lengths, capacity, multiple_of), pack(shuffled, capacity, multiple_of)
    assert [sorted(lengths[inside]) for inside in first] == [sorted(shuffled[inside]) for inside in second]


@NATIVE
@given(samples(), st.integers(1, 9))
def test_native_and_python_pack_alike(given: tuple[Ints, int], multiple_of: int) -> None:
    ours = pack(*given, multiple_of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "first_fit", first_fit_in_python)
        in_python = pack(*given, multiple_of)
    assert [inside.tolist() for inside in ours] == [inside.tolist() for inside in in_python]


@PROPERTIES
@given(samples(), st.integers(1, 9))
def test_what_is_unused_is_what_the_shape_of_the_fullest_adds(
    given: tuple[Ints, int], multiple_of: int
) -> None:
    lengths, capacity = given
    packed = pack(lengths, capacity, multiple_of)
    sums = [int(lengths[inside].sum()) for inside in packed]
    padding = sum(max(sums) - used for used in sums)
    assert unused_share(lengths, packed) == pytest.approx(padding / max(1, padding + sum(sums)), abs=1e-12)


@pytest.mark.parametrize(
    ("lengths", "multiple_of", "expected"),
    [
        ([], 4, []),
        ([3], 1, [[0]]),
        ([3], 3, [[0], [], []]),
        ([10, 10, 10], 1, [[0], [1], [2]]),
        ([6, 5, 5, 4], 1, [[0, 3], [1, 2]]),
        ([9, 1, 9, 1, 1, 1], 1, [[0], [2], [1, 3, 4, 5]]),
        ([9, 1, 1, 1, 1], 4, [[0], [1], [2, 4], [3]]),
    ],
)
def test_small_cases(lengths: list[int], multiple_of: int, expected: list[list[int]]) -> None:
    packed = pack(np.array(lengths, np.int64), 10, multiple_of)
    assert [inside.tolist() for inside in packed] == expected


@pytest.mark.parametrize("wrong", [0, -1, 11])
def test_a_sample_that_fits_no_bin_is_named(wrong: int) -> None:
    lengths = np.array([1, 10, wrong, wrong], np.int64)
    for packs in (pack, first_fit_decreasing):
        with pytest.raises(
            ValueError, match=f"sample 2 has {wrong} tokens, a bin holds 1 to 10; 2 of 4 samples"
        ):
            packs(lengths, 10)


def test_packing_waits_for_no_torch() -> None:
    code = "import sys, llm3d.data.packing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
