"""Every layout gives each rank its place: tensor fastest, then data, then pipeline."""

from __future__ import annotations

import os
import resource
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from llm3d.parallel.mesh import Mesh
from tests import pool
from tests.pool import spawn

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


def members(group: dist.ProcessGroup) -> list[int]:
    """A rank's group of itself is none that torch knows."""
    return [dist.get_rank()] if group.size() == 1 else dist.get_process_group_ranks(group)


def place_on_rank(tensor: int, pipeline: int) -> Place:
    mesh = Mesh(tensor, pipeline)
    names = ("tensor", "data", "replicas", "stage_group", "model", "everyone")
    return Place(
        (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank),
        (mesh.pipeline_size, mesh.data_size, mesh.tensor_size),
        {name: members(getattr(mesh, name)) for name in names},
        members(mesh.embedding) if mesh.embedding is not None else None,
        [members(group) for group in mesh.channels.values()],
        len({id(group) for group in [*mesh.channels.values(), mesh.everyone]}),
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
            "replicas": ranks_where(p, None, t),
            "stage_group": ranks_where(p, None, None),
            "model": ranks_where(None, d, None),
            "everyone": list(range(world)),
        }
        assert place.ends == (p == 0, p == pipeline - 1)
        at_an_end = pipeline > 1 and p in (0, pipeline - 1)
        assert place.embedding == ([pipeline_ranks[0], pipeline_ranks[-1]] if at_an_end else None)
        assert place.channels == ([pipeline_ranks] * 4 if pipeline > 1 else [])
        assert place.num_channels == (5 if pipeline > 1 else 1), "messages on two channels never meet"


def sockets() -> int:
    paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(path).startswith("socket:") for path in paths if os.path.islink(path))


@spawn(world_size=8)
def test_ranks_connect_when_they_first_talk(mesh: Mesh) -> None:
    """A sum goes round a ring: of seven others a rank connects to two neighbors, and it listens."""
    before = sockets()
    dist.all_reduce(torch.zeros(1), group=dist.new_group())
    assert sockets() - before <= 3
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard, "there may be as many as the system allows"


def blocks_on_rank(tensor: int, size: int) -> list[int]:
    return dist.get_process_group_ranks(Mesh(tensor).tensor_blocks(size))


def test_blocks_are_neighbors_in_a_tensor_group() -> None:
    blocks = pool.run(blocks_on_rank, 8, 4, 2)
    assert blocks == [[rank - rank % 2, rank - rank % 2 + 1] for rank in range(8)]
