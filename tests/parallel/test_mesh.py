"""Every layout gives each rank its place: tensor fastest, then data, then pipeline."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch.distributed as dist

from llm3d.parallel.mesh import Mesh
from tests import pool

WORLD = 8
LAYOUTS = [(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if WORLD % (t * p) == 0] + [
    (3, 1),
    (1, 3),
    (3, 2),
]


class Place(NamedTuple):
    coordinates: tuple[int, int, int]  # pipeline, data, tensor
    sizes: tuple[int, int, int]
    groups: dict[str, list[int]]
    embedding: list[int] | None
    channels: list[list[int]]
    num_channels: int  # that are different groups
    ends: tuple[bool, bool]


def place_on_rank(tensor: int, pipeline: int) -> Place:
    mesh = Mesh(tensor, pipeline)
    names = ("tensor", "data", "pipeline", "model", "everyone")
    members = dist.get_process_group_ranks
    return Place(
        (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank),
        (mesh.pipeline_size, mesh.data_size, mesh.tensor_size),
        {name: members(getattr(mesh, name)) for name in names},
        members(mesh.embedding) if mesh.embedding is not None else None,
        [members(group) for group in mesh.channels.values()],
        len({id(group) for group in [*mesh.channels.values(), mesh.pipeline]}),
        (mesh.is_first_stage, mesh.is_last_stage),
    )


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_ranks_are_laid_out_tensor_fastest_then_data_then_pipeline(tensor: int, pipeline: int) -> None:
    world = WORLD // (tensor * pipeline) * (tensor * pipeline)
    data = world // (tensor * pipeline)
    places = pool.run(place_on_rank, world, tensor, pipeline)
    for rank, place in enumerate(places):
        p, d, t = place.coordinates
        assert place.sizes == (pipeline, data, tensor)
        assert rank == (p * data + d) * tensor + t
        assert 0 <= p < pipeline and 0 <= d < data and 0 <= t < tensor

        def ranks_where(*fixed: int | None) -> list[int]:
            """Ranks whose coordinates are these, None being any."""
            return [
                other
                for other, there in enumerate(places)
                if all(want in (None, have) for want, have in zip(fixed, there.coordinates, strict=True))
            ]

        pipeline_ranks = ranks_where(None, d, t)
        assert place.groups == {
            "tensor": ranks_where(p, d, None),
            "data": ranks_where(p, None, t),
            "pipeline": pipeline_ranks,
            "model": ranks_where(None, d, None),
            "everyone": list(range(world)),
        }
        assert place.ends == (p == 0, p == pipeline - 1)
        at_an_end = pipeline > 1 and p in (0, pipeline - 1)
        assert place.embedding == ([pipeline_ranks[0], pipeline_ranks[-1]] if at_an_end else None)
        assert place.channels == ([pipeline_ranks] * 4 if pipeline > 1 else [])
        assert place.num_channels == (5 if pipeline > 1 else 1), "messages on two channels never meet"


def blocks_on_rank(tensor: int, size: int) -> list[int]:
    return dist.get_process_group_ranks(Mesh(tensor).tensor_blocks(size))


def test_blocks_are_neighbours_in_a_tensor_group() -> None:
    blocks = pool.run(blocks_on_rank, 8, 4, 2)
    assert blocks == [[rank - rank % 2, rank - rank % 2 + 1] for rank in range(8)]
