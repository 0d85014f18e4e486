"""The ranks and process groups of one layout: tensor fastest, then data, then pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Mesh:
    """Process groups of a tensor x data x pipeline layout over the whole world, whose other ranks are data ranks.

    The rank at (pipeline p, data d, tensor t) is (p * data + d) * tensor + t, so that a tensor group sits on
    neighbouring devices, where the links are fastest, and stages sit furthest apart.

    tensor, data, pipeline: the groups this rank communicates in along each axis.
    stage: all ranks of this rank's pipeline stage (tensor x data).
    model: all ranks of this rank's model replica (tensor x pipeline).
    embedding: first and last stage of this pipeline; None on other stages, and with one stage.
    everyone: all ranks.
    channels: one group per direction of pipeline traffic, so that the messages between two ranks on a channel
        all flow one way and match first-in first-out: (forward or backward, wraps from last to first rank).

    All ranks construct their meshes in the same order: each rank takes part in making every group.
    """

    def __init__(
        self,
        tensor: int = 1,
        pipeline: int = 1,
        device: torch.device | str = "cpu",
        ranks: np.ndarray | None = None,
    ) -> None:
        """ranks: [pipeline, data, tensor], another order of the world's ranks, rising along each axis."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        assert self.size % (tensor * pipeline) == 0, "configuration guarantees a world size that fits"
        self.device = torch.device(device)
        self.tensor_size, self.pipeline_size = tensor, pipeline
        self.data_size = self.size // (tensor * pipeline)
        order = np.arange(self.size) if ranks is None else ranks
        self.ranks = order.reshape(pipeline, self.data_size, tensor)
        assert all((np.diff(self.ranks, axis=axis) > 0).all() for axis in range(3))
        self.pipeline_rank, self.data_rank, self.tensor_rank = (
            int(i[0]) for i in np.nonzero(self.ranks == self.rank)
        )
        self._groups: dict[tuple[int, ...], ProcessGroup] = {}
        self._make_groups()
        self._connect()

    def narrowed(self, tensor: int, pipeline: int) -> Mesh:
        """Of a mesh in the world's own order: one of fewer tensor and pipeline ranks, divisors, and more data ranks.

        Each rank is where its part of the model lies in the part that it then has: of tensor ranks that share a part,
        neighbours become data ranks. Sheng et al. 2024 (HybridFlow), section 5.3. Called by all ranks.
        """
        assert self.tensor_size % tensor == 0 and self.pipeline_size % pipeline == 0
        fewer_stages, fewer_parts = self.pipeline_size // pipeline, self.tensor_size // tensor
        ranks = self.ranks.reshape(pipeline, fewer_stages, self.data_size, tensor, fewer_parts)
        ranks = ranks.transpose(0, 1, 2, 4, 3).reshape(pipeline, -1, tensor)
        return Mesh(tensor, pipeline, self.device, ranks)

    def _make_groups(self) -> None:
        ranks = self.ranks
        self.everyone = self._mine(ranks.reshape(1, -1))
        self.tensor = self._mine(ranks.reshape(-1, self.tensor_size))
        self.data = self._mine(ranks.transpose(0, 2, 1).reshape(-1, self.data_size))
        pipelines = ranks.transpose(1, 2, 0).reshape(-1, self.pipeline_size)
        self.pipeline = self._mine(pipelines)
        self.stage = self._mine(ranks.reshape(self.pipeline_size, -1))
        self.model = self._mine(ranks.transpose(1, 0, 2).reshape(self.data_size, -1))
        self.embedding: ProcessGroup | None = None
        self.channels: dict[tuple[str, bool], ProcessGroup] = {}
        if self.pipeline_size > 1:
            ends = self._mine(pipelines[:, [0, -1]])
            self.embedding = ends if self.is_first_stage or self.is_last_stage else None
            for direction in ("forward", "backward"):
                for wraps in (False, True):
                    self.channels[direction, wraps] = self._mine(pipelines, shared=False)

    def _mine(self, groups: np.ndarray, shared: bool = True) -> ProcessGroup:
        """Make a process group of each row of ranks; -> the one that this rank is in.

        shared: groups of the same ranks are one. A rank in none of them gets a placeholder that it never uses.
        """
        mine: Any = None
        for row in groups.tolist():
            group = self._groups.get(tuple(row)) if shared else None
            if group is None:
                group = dist.new_group(row)
            if shared:
                self._groups[tuple(row)] = group
            mine = group if self.rank in row else mine
        return mine

    def tensor_blocks(self, size: int) -> ProcessGroup:
        """This rank's block, where tensor groups are cut into blocks of `size` neighbours. Called by all ranks."""
        block = self._mine(self.ranks.reshape(-1, size))
        dist.all_reduce(self._token(), group=block)
        return block

    def _connect(self) -> None:
        """Use every group and channel once, in one order on all ranks.

        NCCL makes a communicator at its first use and waits there for the other ranks; in the middle of a
        schedule, which is free of deadlocks only where posting a receive blocks nothing, that could be forever.
        Not `stage`: it carries checkpoints, from host to host.
        """
        for group in (
            self.everyone,
            self.tensor,
            self.data,
            self.pipeline,
            self.model,
            self.embedding,
        ):
            if group is not None:
                dist.all_reduce(self._token(), group=group)
        for (direction, wraps), channel in self.channels.items():
            for stage in range(self.pipeline_size):
                following = (stage + 1) % self.pipeline_size
                if wraps == (following == 0):
                    self._transfer(
                        channel, *((stage, following) if direction == "forward" else (following, stage))
                    )

    def _transfer(self, channel: ProcessGroup, source: int, target: int) -> None:
        if self.pipeline_rank == source:
            dist.send(self._token(), group=channel, group_dst=target)
        elif self.pipeline_rank == target:
            dist.recv(self._token(), group=channel, group_src=source)

    def _token(self) -> Tensor:
        return torch.zeros(1, device=self.device)

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def __str__(self) -> str:
        return f"tensor {self.tensor_size} x pipeline {self.pipeline_size} x data {self.data_size}"


def whole_world() -> ProcessGroup:
    """All ranks that torchrun or Slurm has started, before there is a mesh."""
    group = dist.group.WORLD
    assert isinstance(group, ProcessGroup), "start_process_group has been called"
    return group


@contextmanager
def process_group() -> Iterator[torch.device]:
    """The world, for the time of the block; -> this rank's device."""
    device = start_process_group()
    try:
        yield device
    except BaseException:
        # NCCL would wait here for collectives that the other ranks may never join; the process ends anyway.
        if device.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def device_of_this_process() -> torch.device:
    """The GPU of this process's number on its host; the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start_process_group() -> torch.device:
    """Join the world that the environment describes (RANK and WORLD_SIZE; none: a world of one); -> this rank's device.

    GPUs talk through NCCL, with gloo beside it for small messages between hosts; CPUs through gloo.
    """
    device = device_of_this_process()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The same run gives the same bits, which resuming promises.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    meet()
    return device


def meet() -> None:
    """Wait until all ranks have joined the world.

    init_process_group returns when this rank's connections stand. Were it to end at once, as it does on bad
    input, a rank that is still connecting to it would fail with an error of gloo's, not with this one's.
    """
    dist.all_reduce(torch.zeros(1))
