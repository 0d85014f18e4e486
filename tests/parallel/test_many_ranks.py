"""What a rank opens for a mesh on thousands of GPUs, counted in a world of the fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from llm3d.parallel.mesh import Mesh


class Made(NamedTuple):
    """A group that the rank is in."""

    ranks: tuple[int, ...]
    backend: str
    urgent: bool


@dataclass
class Counted:
    """What a rank does while it makes a mesh."""

    calls: list[tuple[int, ...]] = field(default_factory=list)  # of new_group, in order
    made: list[Made] = field(default_factory=list)
    reduced: set[Any] = field(default_factory=set)  # groups of which NCCL makes a communicator
    pairs: set[tuple[Any, int]] = field(default_factory=set)  # likewise, with one other rank

    def host_groups(self) -> list[Made]:
        return [group for group in self.made if "gloo" in group.backend]


class Options:
    """Of NCCL's process group, which a torch without CUDA does not have."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream, self._timeout = is_high_priority_stream, None


def mesh_on_paper(size: int, rank: int, tensor: int, pipeline: int) -> tuple[Mesh, Counted]:
    counted, new_group = Counted(), dist.new_group

    def making(
        ranks: list[int], backend: str = "cpu:gloo,cuda:nccl", pg_options: Any = None, **_: Any
    ) -> Any:
        counted.calls.append(tuple(ranks))
        if rank in ranks:
            counted.made.append(Made(tuple(sorted(ranks)), backend, pg_options is not None))
        return new_group(ranks)

    def reducing(_: Any, group: Any) -> None:
        counted.reduced.add(group)

    def sending(_: Any, group: Any, group_dst: int) -> None:
        counted.pairs.add((group, group_dst))

    def receiving(_: Any, group: Any, group_src: int) -> None:
        counted.pairs.add((group, group_src))

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    nccl = mock.Mock(Options=Options)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Mesh, "_token", return_value=torch.zeros(1)))
        stack.enter_context(mock.patch.object(dist, "ProcessGroupNCCL", nccl, create=True))
        for name, replacement in (
            ("new_group", making),
            ("all_reduce", reducing),
            ("send", sending),
            ("recv", receiving),
        ):
            stack.enter_context(mock.patch.object(dist, name, replacement))
        return Mesh(tensor, pipeline, "cuda"), counted


@pytest.fixture(autouse=True)
def no_world_afterwards() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


LAYOUTS = [(8, 8), (8, 1), (1, 4), (4, 16), (1, 1), (8, 128)]


@pytest.mark.parametrize("stage", ["first", "middle", "last"])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("size", [1024, 4096])
def test_what_a_rank_opens_does_not_grow_with_the_world(
    size: int, tensor: int, pipeline: int, stage: str
) -> None:
    rank = {"first": 0, "middle": size // 2, "last": size - 1}[stage]
    data = size // (tensor * pipeline)
    mesh, counted = mesh_on_paper(size, rank, tensor, pipeline)
    everyone = tuple(range(size))
    assert mesh.everyone is dist.group.WORLD
    assert all(len(group.ranks) > 1 and group.ranks != everyone for group in counted.made)
    several = [group.ranks for group in counted.made]
    channels = 4 if pipeline > 1 else 0
    assert len(several) - len(set(several)) <= channels, "groups of the same ranks are one"
    # On the device: the world, the tensor, data and embedding groups; two neighbors, to and from each.
    assert len(counted.reduced) <= 4
    assert len(counted.pairs) == channels
    assert mesh.communicators == (len(counted.reduced), len(counted.pairs))
    # Between hosts, beside the world: the tensor, data, stage and model groups, and no other rank than theirs.
    assert len(counted.host_groups()) <= 4
    peers = sum(len(group.ranks) - 1 for group in counted.host_groups())
    assert peers <= tensor + data + tensor * data + tensor * pipeline
    # Every group of the world is numbered once.
    groups = size // tensor + size // data + pipeline + data + (5 * size // pipeline if pipeline > 1 else 0)
    assert len(counted.calls) <= groups


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_all_ranks_number_groups_alike(tensor: int, pipeline: int) -> None:
    calls = []
    for rank in (0, 515, 1023):
        calls.append(mesh_on_paper(1024, rank, tensor, pipeline)[1].calls)
        dist.destroy_process_group()
    assert calls[0] == calls[1] == calls[2]


@pytest.mark.parametrize(("tensor", "pipeline"), [(8, 1), (8, 2), (2, 1)])
def test_tensor_parallel_traffic_goes_before_what_computes(tensor: int, pipeline: int) -> None:
    """Also where the tensor group is all there is."""
    mesh, counted = mesh_on_paper(16 if pipeline > 1 else 8, 0, tensor, pipeline)
    assert [group.ranks for group in counted.made if group.urgent] == [tuple(range(tensor))]
    assert mesh.tensor is not mesh.everyone


def test_another_layout_takes_the_groups_that_are_there() -> None:
    mesh, counted = mesh_on_paper(1024, 0, 8, 4)
    before = list(counted.made)
    with (
        mock.patch.object(Mesh, "_token", return_value=torch.zeros(1)),
        mock.patch.object(dist, "all_reduce"),
    ):
        mesh.device = torch.device("cpu")
        narrow = mesh.narrowed(8, 1)
    assert narrow.tensor is mesh.tensor and narrow.everyone is mesh.everyone
    assert counted.made == before
