"""The ranks and process groups of one layout: tensor fastest, then data, then pipeline."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


class Mesh:
    """Process groups of a tensor x data x pipeline layout over the whole world, whose other ranks are data ranks.

    The rank at (pipeline p, data d, tensor t) is (p * data + d) * tensor + t, so that a tensor group sits on
    neighbouring devices, where the links are fastest, and stages sit furthest apart.

    tensor, data, pipeline: the groups this rank communicates in along each axis.
    model: all ranks of this rank's model replica (tensor x pipeline).
    embedding: first and last stage of this pipeline; None on other stages, and with one stage.
    everyone: all ranks.
    channels: one group per direction of pipeline traffic, so that the messages between two ranks on a channel
        all flow one way and match first-in first-out: (forward or backward, wraps from last to first rank).

    All ranks construct their meshes in the same order: each rank takes part in making every group.
    """

    def __init__(self, tensor: int = 1, pipeline: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        assert self.size % (tensor * pipeline) == 0, "configuration guarantees a world size that fits"
        self.device = torch.device(device)
        self.tensor_size, self.pipeline_size = tensor, pipeline
        self.data_size = self.size // (tensor * pipeline)
        self.tensor_rank = self.rank % tensor
        self.data_rank = self.rank // tensor % self.data_size
        self.pipeline_rank = self.rank // (tensor * self.data_size)
        self._groups: dict[tuple[int, ...], ProcessGroup] = {}
        self._make_groups()

    def _make_groups(self) -> None:
        ranks = np.arange(self.size).reshape(self.pipeline_size, self.data_size, self.tensor_size)
        self.everyone = self._mine(ranks.reshape(1, -1))
        self.tensor = self._mine(ranks.reshape(-1, self.tensor_size))
        self.data = self._mine(ranks.transpose(0, 2, 1).reshape(-1, self.data_size))
        pipelines = ranks.transpose(1, 2, 0).reshape(-1, self.pipeline_size)
        self.pipeline = self._mine(pipelines)
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
        return self._mine(np.arange(self.size).reshape(-1, size))

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def __str__(self) -> str:
        return f"tensor {self.tensor_size} x pipeline {self.pipeline_size} x data {self.data_size}"


def start_process_group(timeout: timedelta = timedelta(minutes=30)) -> torch.device:
    """Join the world that the environment describes (RANK and WORLD_SIZE; none: a world of one); -> this rank's device.

    GPUs talk through NCCL, with gloo beside it for small messages between hosts; CPUs through gloo.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device
