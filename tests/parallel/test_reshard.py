"""After a hand-over every rank has what it wants, each element sent once, and none that it had already."""

from __future__ import annotations

import itertools
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm3d.checkpoint.starting import load_first_weights
from llm3d.parallel import reshard
from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.reshard import Transfer, WeightSync, _encoded, in_buckets, plan_transfers
from llm3d.train.trainer import ShardedModel, Trainer
from tests import pool
from tests.models.layouts import Layout, config_for

SHAPES = {"a.weight": (7, 5), "b.weight": (6,), "c.weight": (1, 9)}


# ---- boxes ----


@st.composite
def boxes(draw: st.DrawFn, name: str) -> Box:
    shape = SHAPES[name]
    ends = [sorted(draw(st.sets(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
    return Box(name, shape, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def marked(box: Box) -> np.ndarray:
    """Which elements of the global tensor are in the box."""
    mask = np.zeros(box.shape, dtype=int)
    mask[box.slices_within(Box.whole(box.name, box.shape))] = 1
    return mask


@given(st.sampled_from(sorted(SHAPES)).flatmap(lambda name: st.tuples(boxes(name), boxes(name))))
def test_what_a_box_has_without_another(pair: tuple[Box, Box]) -> None:
    one, other = pair
    expected = marked(one) * (1 - marked(other))
    np.testing.assert_array_equal(sum([marked(part) for part in one.without(other)], 0 * expected), expected)


# ---- plans ----


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[list[Box]], list[list[Box]]]:
    """What some ranks hold, each element at least once and perhaps twice, and what they want."""
    num_ranks = draw(st.integers(1, 5))
    held: list[list[Box]] = [[] for _ in range(num_ranks)]
    for name, shape in SHAPES.items():
        for _ in range(draw(st.integers(1, 2))):
            cuts = [0, *sorted(draw(st.sets(st.integers(1, max(1, shape[0] - 1)), max_size=3))), shape[0]]
            for first, last in itertools.pairwise(cuts):
                box = Box.whole(name, shape).rows(first, last - first)
                if box.numel:
                    held[draw(st.integers(0, num_ranks - 1))].append(box)
    names = st.sampled_from(sorted(SHAPES))
    wanted = [draw(st.lists(names.flatmap(boxes), max_size=4)) for _ in range(num_ranks)]
    return held, wanted


@given(situations())
def test_every_element_that_is_wanted_comes_once(situation: tuple[list[list[Box]], list[list[Box]]]) -> None:
    held, wanted = situation
    transfers = plan_transfers(held, wanted)
    for target, some in enumerate(wanted):
        for name, shape in SHAPES.items():
            asked = sum([marked(box) for box in some if box.name == name], np.zeros(shape, dtype=int))
            arrived = [t for t in transfers if t.target == target and t.box.name == name]
            np.testing.assert_array_equal(
                sum([marked(t.box) for t in arrived], np.zeros(shape, dtype=int)), asked
            )
            here = sum([marked(box) for box in held[target] if box.name == name], np.zeros(shape, dtype=int))
            for transfer in arrived:
                if transfer.source != target:
                    assert not (marked(transfer.box) * here).any(), "what is here does not travel"
    for box, source, _ in transfers:
        assert any(box.intersect(other) == box for other in held[source])


@given(situations(), st.integers(1, 12))
def test_buckets_hold_all_and_no_more_than_they_may(
    situation: tuple[list[list[Box]], list[list[Box]]], elements: int
) -> None:
    transfers = plan_transfers(*situation)
    buckets = in_buckets(transfers, elements)
    for bucket in buckets:
        for rank in range(len(situation[0])):
            for end in (1, 2):
                assert sum(t.box.numel for t in bucket if t[end] == rank) <= elements

    def elements_of(some: list[Transfer]) -> list[Any]:
        return sorted(
            (t.source, t.target, t.box.name, tuple(place))
            for t in some
            for place in np.argwhere(marked(t.box)).tolist()
        )

    assert elements_of([t for bucket in buckets for t in bucket]) == elements_of(transfers)


# ---- models ----


SHAPE = {
    "vocab_size": 1031,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
BUCKET = 2**18
HAND_OVERS = [
    (Layout(tensor=4, pipeline=2), (2, 1)),
    (Layout(tensor=4, pipeline=2), (1, 2)),
    (Layout(tensor=2, pipeline=2, data=2, zero=3), (1, 1)),
    (Layout(tensor=8), (2, 1)),
    (Layout(tensor=2, pipeline=2, chunks=2), (2, 1)),
    (Layout(data=3, zero=2), (1, 1)),
]


@pytest.fixture(scope="module", params=[False, True], ids=["two tables", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=request.param)).save_pretrained(path)
    return path


class PeakOfTensors(TorchDispatchMode):
    """Use as a context manager: `peak` is the most bytes that tensors made in the block took up at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, out = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in (args, result))
        there = {x.untyped_storage()._cdata for x in given}
        for storage in (x.untyped_storage() for x in out):
            if storage._cdata not in there:
                self.made[storage._cdata] = weakref.ref(storage)
        alive = [found for made in self.made.values() if (found := made()) is not None]
        self.peak = max(self.peak, sum(found.nbytes() for found in alive))
        return result


def hand_over_on_rank(path: Path, layout: Layout, narrow: tuple[int, int]) -> tuple[int, int, int]:
    """Bytes that came, that had to come, and that were allocated on the way."""
    mesh = Mesh(layout.tensor, layout.pipeline)
    trainer = Trainer(config_for(path, layout), mesh)
    load_first_weights(trainer)
    inside = mesh.narrowed(*narrow)
    config = config_for(path, Layout(*narrow, layout.world_size // (narrow[0] * narrow[1])))
    generating, expected = ShardedModel(config, inside), ShardedModel(config, inside)
    load_first_weights(expected)
    held = [piece.box for piece, _ in trainer.flat.local_weights()]
    wanted = [piece.box for piece, _ in generating.weights()]
    weight_sync = WeightSync(held, wanted, mesh.everyone, BUCKET)
    for _, view in generating.weights():
        view.fill_(torch.nan)
    moved = weight_sync.run(trainer.flat.local_weights(), generating.weights())
    for (piece, mine), (_, theirs) in zip(generating.weights(), expected.weights(), strict=True):
        assert torch.equal(mine, theirs), piece.box
    missing = 0
    for box in wanted:
        holes = [box]
        for other in held:
            holes = [rest for hole in holes for rest in hole.without(other)]
        missing += 4 * sum(hole.numel for hole in holes)
    with PeakOfTensors() as made:
        again = weight_sync.run(trainer.flat.local_weights(), generating.weights())
    assert again[:2] == moved[:2]
    return moved.received_bytes, missing, made.peak


@pytest.mark.parametrize(("layout", "narrow"), HAND_OVERS, ids=str)
def test_generation_gets_the_weights_of_training(
    layout: Layout, narrow: tuple[int, int], model: Path
) -> None:
    """As a checkpoint would give them; only what is not there travels, and it needs little room on the way."""
    for received, missing, allocated in pool.run(hand_over_on_rank, layout.world_size, model, layout, narrow):
        assert received == missing
        assert allocated <= 2 * BUCKET


def sent_nowhere(*_: object, **__: object) -> None:
    """A collective of a rank that is alone with its plan."""


def calls_of_a_run(num_ranks: int) -> int:
    """Of Python functions and methods, in one hand-over on one rank of so many; of four, each wants a quarter."""
    box, wanted = (
        Box.whole("a.weight", (64, 8)),
        [[Box.whole("a.weight", (64, 8)).rows(16 * i, 16)] for i in range(4)],
    )
    boxes = [([box.rows(32 * i, 32)] if i < 2 else [], wanted[i] if i < 4 else []) for i in range(num_ranks)]
    group = mock.Mock(rank=lambda: 0, size=lambda: num_ranks)
    encoded = [_encoded(*each) for each in boxes]
    with mock.patch.object(reshard, "gather_bytes", return_value=encoded):
        weight_sync = WeightSync(*boxes[0], group, bucket_bytes=256)
    source = [(Piece(each), torch.zeros(each.size)) for each in boxes[0][0]]
    target = [(Piece(each), torch.zeros(each.size)) for each in boxes[0][1]]
    calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with mock.patch.object(reshard.dist, "all_to_all_single", sent_nowhere):
        sys.setprofile(count)
        try:
            weight_sync.run(source, target)
        finally:
            sys.setprofile(None)
    return calls


def test_who_sends_what_is_worked_out_once() -> None:
    """A hand-over costs a rank what it sends and receives, however many ranks there are."""
    assert calls_of_a_run(512) == calls_of_a_run(8)


def ranks_on_rank(layout: Layout, narrow: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    mesh = Mesh(layout.tensor, layout.pipeline)
    inside = mesh.narrowed(*narrow)
    return (
        (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank),
        (inside.pipeline_rank, inside.data_rank, inside.tensor_rank),
    )


@pytest.mark.parametrize(("layout", "narrow"), HAND_OVERS, ids=str)
def test_a_rank_stays_where_its_part_of_the_model_is(layout: Layout, narrow: tuple[int, int]) -> None:
    """The training shard lies inside of the generation shard, and all generation shards are there."""
    tensor, pipeline = narrow
    places = pool.run(ranks_on_rank, layout.world_size, layout, narrow)
    for (p, _, t), (gp, _, gt) in places:
        assert (gp, gt) == (p * pipeline // layout.pipeline, t * tensor // layout.tensor)
    found = {inside for _, inside in places}
    assert len(found) == layout.world_size


def test_a_piece_of_memory_may_hold_several_boxes() -> None:
    """Views are found by what they hold, whatever they are part of."""
    box = Box.whole("a.weight", (4, 3))
    local = torch.arange(12.0).view(4, 3)
    pieces = [(Piece(box.rows(i, 2)), local[i : i + 2]) for i in (0, 2)]
    ((copied, received),) = pool.run(copied_on_rank, 1, pieces, Piece(box))
    assert torch.equal(copied, local) and received == 0


def copied_on_rank(pieces: list[tuple[Piece, torch.Tensor]], wanted: Piece) -> tuple[torch.Tensor, int]:
    weight_sync = WeightSync([piece.box for piece, _ in pieces], [wanted.box], Mesh().everyone)
    target = torch.zeros(wanted.box.size)
    moved = weight_sync.run(pieces, [(wanted, target)])
    return target, moved.received_bytes
