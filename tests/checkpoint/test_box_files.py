"""Whatever boxes a tensor was stored as, any other box of it can be read."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3d.checkpoint.box_files import BoxReader, BoxWriter, split_by_size
from llm3d.errors import InputError
from llm3d.parallel.boxes import Box
from tests.gpu import ON_GPU

extents = st.integers(1, 12)


@st.composite
def partitions(draw: st.DrawFn, whole: Box) -> list[Box]:
    """Cut a box in two, at random, again and again."""
    boxes = [whole]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(whole.shape) - 1))
        cut = draw(st.integers(0, box.size[axis]))
        for start, extent in ((0, cut), (cut, box.size[axis] - cut)):
            if extent:
                offset, size = list(box.offset), list(box.size)
                offset[axis], size[axis] = offset[axis] + start, extent
                boxes.append(Box(box.name, box.shape, tuple(offset), tuple(size)))
    return draw(st.permutations(boxes))


@st.composite
def stored_and_wanted(draw: st.DrawFn) -> tuple[list[Box], list[Box]]:
    whole = Box.whole("weight", draw(st.lists(extents, min_size=1, max_size=2)))
    return draw(partitions(whole)), draw(partitions(whole))


@settings(max_examples=60, deadline=None)
@given(stored_and_wanted(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3))
def test_any_box_is_read_from_any_partition(
    boxes: tuple[list[Box], list[Box]], dtype: torch.dtype, num_files: int
) -> None:
    stored, wanted = boxes
    values = torch.arange(Box.whole("weight", stored[0].shape).numel).view(stored[0].shape).to(dtype)
    with TemporaryDirectory() as directory:
        writer = BoxWriter(Path(directory))
        for i in range(num_files):
            parts = [(str(box.offset), box, values[slices(box)]) for box in stored[i::num_files]]
            if parts:
                writer.tensors(f"{i}.safetensors", parts)
        assert writer.failure is None
        reader = BoxReader(Path(directory))
        for part in writer.boxes:
            reader.check(part)
        for box in wanted:
            into = torch.full(box.size, torch.nan)
            reader.read(box, writer.boxes, into)
            assert torch.equal(into, values[slices(box)].float())
            others = [part for part in writer.boxes if part.box != writer.boxes[0].box]
            if box.intersect(writer.boxes[0].box):
                with pytest.raises(InputError, match="weight"):
                    reader.read(box, others, into)


def slices(box: Box) -> tuple[slice, ...]:
    return box.slices_within(Box.whole(box.name, box.shape))


@given(st.lists(st.integers(0, 30)), st.integers(1, 40))
def test_runs_cover_the_items_in_order_within_the_limit(sizes: list[int], limit: int) -> None:
    runs = split_by_size(sizes, limit)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    assert all(len(run) == 1 or sum(sizes[i] for i in run) <= limit for run in runs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_what_is_written_is_what_the_device_holds_at_that_time(device: str, tmp_path: Path) -> None:
    """Views with strides of several sizes, which are overwritten as soon as they are said to be written."""
    tables = [torch.randn(300, 500, device=device) for _ in range(3)]
    views = {"rows": tables[0][3:200], "columns": tables[1][:, 7:300], "across": tables[2].t()[:20]}
    expected = {key: view.clone().cpu() for key, view in views.items()}
    writer = BoxWriter(tmp_path)
    entries = [(key, Box.whole(key, tuple(view.shape)), view) for key, view in views.items()]
    writer.tensors("x.safetensors", entries)
    for table in tables:
        table.zero_()
    reader = BoxReader(tmp_path)
    for stored in writer.boxes:
        reader.check(stored)
        assert torch.equal(reader.tensor(stored), expected[stored.key])
