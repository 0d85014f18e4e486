"""Boxes are sets of elements of global tensors; their operations are those of the sets."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from llm3d.parallel.boxes import Box, Piece, stack
from llm3d.parallel.layers import split_evenly, vocabulary_range

extents = st.integers(0, 6)


@st.composite
def boxes_of(draw: st.DrawFn, shape: tuple[int, ...], name: str = "weight") -> Box:
    offset = tuple(draw(st.integers(0, extent)) for extent in shape)
    size = tuple(draw(st.integers(0, extent - start)) for extent, start in zip(shape, offset, strict=True))
    return Box(name, shape, offset, size)


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    shape = tuple(draw(st.lists(extents, min_size=1, max_size=3)))
    return draw(boxes_of(shape)), draw(boxes_of(shape))


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(a, a + n) for a, n in zip(box.offset, box.size, strict=True))))


@given(two_boxes())
def test_an_intersection_holds_what_both_hold(boxes: tuple[Box, Box]) -> None:
    first, second = boxes
    common = first.intersect(second)
    assert common == second.intersect(first)
    assert (elements(common) if common else set()) == elements(first) & elements(second)
    assert first.numel == len(elements(first))
    assert first.intersect(first) == (first if first.numel else None)


@given(two_boxes())
def test_boxes_of_different_tensors_have_nothing_in_common(boxes: tuple[Box, Box]) -> None:
    first, second = boxes
    assert first.intersect(Box("another", *list(vars(second).values())[1:])) is None


@given(two_boxes())
def test_an_intersection_is_found_at_the_same_values_in_both(boxes: tuple[Box, Box]) -> None:
    first, second = boxes
    common = first.intersect(second)
    whole = Box.whole("weight", first.shape)
    assert whole.size == whole.shape and whole.intersect(first) == (first if first.numel else None)
    if common is not None:
        values = torch.arange(whole.numel).view(whole.shape)
        parts = [values[box.slices_within(whole)][common.slices_within(box)] for box in boxes]
        assert torch.equal(parts[0], parts[1])
        assert torch.equal(parts[0], values[common.slices_within(whole)])


@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_rows_and_columns_count_from_the_box_itself(data: st.DataObject, height: int, width: int) -> None:
    box = data.draw(boxes_of((height, width)))
    values = torch.arange(height * width).view(height, width)
    whole = Box.whole("weight", (height, width))
    local = values[box.slices_within(whole)]
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, box.size[0])] * 2)))
    assert torch.equal(values[box.rows(start, stop - start).slices_within(whole)], local[start:stop])
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, box.size[1])] * 2)))
    assert torch.equal(values[box.columns(start, stop - start).slices_within(whole)], local[:, start:stop])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_stacked_pieces_cover_a_parameter_without_overlap(heights: list[int]) -> None:
    pieces = stack([Piece(Box.whole(f"part {i}", (height, 3))) for i, height in enumerate(heights)])
    local = torch.arange(3 * sum(heights)).view(-1, 3)
    assert torch.equal(torch.cat([piece.view(local) for piece in pieces]), local)
    assert [piece.box.name for piece in pieces] == [f"part {i}" for i in range(len(heights))]


def parts(split: Any, extent: int, num_ranks: int) -> list[range]:
    """What each rank of a group gets."""
    return [
        split(extent, SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: num_ranks))
        for rank in range(num_ranks)
    ]


@given(st.integers(1, 200), st.integers(1, 16))
def test_every_token_id_is_in_one_part_of_the_vocabulary(vocab_size: int, num_ranks: int) -> None:
    ranges = parts(vocabulary_range, vocab_size, num_ranks)
    assert [i for part in ranges for i in part] == list(range(vocab_size))
    assert max(map(len, ranges)) == -(-vocab_size // num_ranks), "no part is larger than it need be"
    assert [len(part) for part in ranges] == sorted(map(len, ranges), reverse=True)


@given(st.integers(1, 20), st.integers(1, 16))
def test_even_parts_are_equal_and_in_order(part: int, num_ranks: int) -> None:
    ranges = parts(split_evenly, part * num_ranks, num_ranks)
    assert [i for part in ranges for i in part] == list(range(part * num_ranks))
    assert {len(part) for part in ranges} == {part}


@given(st.data(), st.lists(extents, min_size=1, max_size=2))
def test_a_range_of_elements_is_at_most_three_boxes_in_order(data: st.DataObject, shape: list[int]) -> None:
    box = data.draw(boxes_of(tuple(shape)))
    start = data.draw(st.integers(0, box.numel))
    count = data.draw(st.integers(0, box.numel - start))
    whole = torch.arange(Box.whole("weight", shape).numel).view(shape)
    values = whole[box.slices_within(Box.whole("weight", shape))].flatten()
    parts = box.elements(start, count)
    found = [whole[part.slices_within(Box.whole("weight", shape))].flatten() for part in parts]
    assert len(parts) <= (3 if len(shape) == 2 else 1) and all(part.numel for part in parts)
    assert torch.equal(torch.cat([values[:0], *found]), values[start : start + count])
