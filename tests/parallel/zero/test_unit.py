"""A unit's shards hold each of its elements once, under its global name."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import ProcessGroup

from llm3d.parallel.boxes import Box, Piece, ShardedParameter, stack
from llm3d.parallel.zero.unit import ALIGNMENT, FlatUnit

CPU = torch.device("cpu")


@st.composite
def parameters(draw: st.DrawFn) -> list[ShardedParameter]:
    """Matrices of one or two pieces, some without rows, and vectors, each named by its number."""
    made = []
    for i in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            pieces = [Piece(Box.whole(f"{i}", (draw(st.integers(1, 300)),)))]
        else:
            columns, rows = (
                draw(st.integers(1, 90)),
                draw(st.lists(st.integers(0, 9), min_size=1, max_size=2)),
            )
            pieces = [Piece(Box.whole(f"{i}.{j}", (n, columns))) for j, n in enumerate(rows)]
        made.append(ShardedParameter.on_meta(stack(pieces)))
    return made


def sharded_unit(made: list[ShardedParameter], num_shards: int, rank: int) -> FlatUnit:
    """As one of so many ranks has it; nothing is sent."""
    group = ProcessGroup(dist.HashStore(), rank, num_shards)
    return FlatUnit(made, group, torch.float32, CPU, sharded=True)


@given(parameters(), st.integers(1, 5))
def test_shards_hold_every_element_once(made: list[ShardedParameter], num_shards: int) -> None:
    units = [sharded_unit(made, num_shards, rank) for rank in range(num_shards)]
    whole = {piece.box.name: torch.zeros(piece.box.shape) for p in made for piece in p.pieces}
    decayed = torch.zeros(units[0].size)
    for unit in units:
        assert unit.shard_size % ALIGNMENT == 0 and len(unit.parameters) == unit.shard_size
        unit.parameters[: unit.decayed()] += 1
        decayed[unit.start : unit.start + unit.shard_size] += unit.parameters
        for piece, view in unit.pieces(torch.ones(unit.shard_size)):
            assert view.shape == piece.box.size
            target = whole[piece.box.name][
                piece.box.slices_within(Box.whole(piece.box.name, piece.box.shape))
            ]
            target += view
    assert all((tensor == 1).all() for tensor in whole.values())
    # Weight decay is for matrices, which come first.
    count = sum(p.numel() for p in made if p.dim() > 1)
    assert torch.equal(decayed, (torch.arange(units[0].size) < count).float())


@given(parameters(), st.integers(1, 5))
def test_a_piece_is_where_the_parameter_has_it(made: list[ShardedParameter], num_shards: int) -> None:
    units = [sharded_unit(made, num_shards, rank) for rank in range(num_shards)]
    values = torch.arange(float(units[0].size))
    for unit in units:
        unit.whole.copy_(values)
        for piece, view in unit.pieces(values[unit.start : unit.start + unit.shard_size]):
            parameter, origin = next(
                (placed, whole)
                for placed, _ in unit.layout.values()
                for whole in placed.pieces
                if whole.box.name == piece.box.name
            )
            rows = parameter[piece.row : piece.row + piece.box.size[0]]
            within = piece.box.slices_within(origin.box)[1:]
            everywhere = (slice(None), *within)
            assert torch.equal(rows[everywhere], view)


def test_padding_of_new_gradients_is_zero() -> None:
    unit = sharded_unit([ShardedParameter.on_meta([Piece(Box.whole("w", (3, 7)))])], 2, 0)
    unit.attach(torch.full((unit.size,), torch.nan))
    assert unit.whole_gradients is not None
    assert unit.whole_gradients.isnan().sum() == 21
