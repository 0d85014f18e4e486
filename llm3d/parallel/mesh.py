"""The ranks and process groups of one layout: tensor fastest, then data, then pipeline."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.errors import InputError
from llm3d.parallel.collectives import is_alone
from llm3d.parallel.failures import failures_end_all_ranks
from llm3d.wording import counted

# What a group carries where the mesh is on GPUs: tensors of the device, of the host, or both. NCCL makes a communicator
# on the device at the first use; gloo opens sockets.
_DEVICE, _HOST, _BOTH = "nccl", "gloo", "cpu:gloo,cuda:nccl"


class Communicators(NamedTuple):
    """How many a rank has, each with its buffers on the device."""

    collective: int
    pair: int  # for messages to, or from, one neighbor


class Mesh:
    """Process groups of a tensor x data x pipeline layout over the whole world, whose other ranks are data ranks.

    The rank at (pipeline p, data d, tensor t) is (p * data + d) * tensor + t, so that a tensor group sits on
    neighboring devices, where the links are fastest, and stages sit furthest apart.

    everyone: all ranks; the world itself.
    tensor, data: the groups this rank communicates in along each axis. Data ranks read different samples.
    replicas: the ranks that hold the same part of the model. Gradients are summed over them, and ZeRO spreads over them
        what each would hold a copy of. Today these are the data ranks; ranks that share a sample's tokens would be
        among them, too.
    stage_group: all ranks of this rank's pipeline stage (tensor x data). For tensors in host memory.
    model: all ranks of this rank's model replica (tensor x pipeline). For tensors in host memory.
    embedding: first and last stage of this pipeline, for tensors on the device; None on other stages, and with one
        stage.
    channels: one group of this pipeline's ranks per direction of its traffic, so that the messages between two ranks
        on a channel all flow one way and match first-in first-out: (forward or backward, wraps from last to first
        rank). For tensors on the device.

    What a rank opens does not grow with the world, but for sockets that it uses: at most 4 communicators over groups
    and 4 with neighbors (`tensor_blocks` adds one), and none for itself alone. A group with no other rank only says
    its size. Groups of the same ranks are one.

    All ranks construct their meshes in the same order: each rank numbers every group, for torch tells groups apart by
    their numbers. That takes microseconds a group; a rank that is not in it opens nothing.
    """

    def __init__(
        self,
        tensor: int = 1,
        pipeline: int = 1,
        device: torch.device | str = "cpu",
        ranks: np.ndarray | None = None,
        known: dict[tuple[int, ...], list[_Group]] | None = None,
    ) -> None:
        """ranks: [pipeline, data, tensor], another order of the world's ranks, rising along each axis.

        known: groups that are there already, by their ranks.
        """
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
        self._groups = {} if known is None else known
        self._make_groups()
        self._connect()

    def narrowed(self, tensor: int, pipeline: int) -> Mesh:
        """Of a mesh in the world's own order: one of fewer tensor and pipeline ranks, divisors, and more data ranks.

        Each rank is where its part of the model lies in the part that it then has: of tensor ranks that share a part,
        neighbors become data ranks. Sheng et al. 2024 (HybridFlow), section 5.3. Called by all ranks.
        """
        assert self.tensor_size % tensor == 0 and self.pipeline_size % pipeline == 0
        fewer_stages, fewer_parts = self.pipeline_size // pipeline, self.tensor_size // tensor
        ranks = self.ranks.reshape(pipeline, fewer_stages, self.data_size, tensor, fewer_parts)
        ranks = ranks.transpose(0, 1, 2, 4, 3).reshape(pipeline, -1, tensor)
        return Mesh(tensor, pipeline, self.device, ranks, self._groups)

    def _make_groups(self) -> None:
        ranks, pipelines = self.ranks, self.ranks.transpose(1, 2, 0).reshape(-1, self.pipeline_size)
        self.everyone = whole_world()
        self._groups.setdefault(tuple(range(self.size)), [_Group(self.everyone, _BOTH)])
        self.tensor = self._mine(ranks.reshape(-1, self.tensor_size), urgent=True)
        self.data = self._mine(ranks.transpose(0, 2, 1).reshape(-1, self.data_size))
        self.replicas = self.data
        self.embedding: ProcessGroup | None = None
        self.channels: dict[tuple[str, bool], ProcessGroup] = {}
        if self.pipeline_size > 1:
            ends = self._mine(pipelines[:, [0, -1]], _DEVICE)
            self.embedding = ends if self.is_first_stage or self.is_last_stage else None
            for direction in ("forward", "backward"):
                for wraps in (False, True):
                    self.channels[direction, wraps] = self._mine(pipelines, _DEVICE, shared=False)
        self.stage_group = self._mine(ranks.reshape(self.pipeline_size, -1), _HOST)
        self.model = self._mine(ranks.transpose(1, 0, 2).reshape(self.data_size, -1), _HOST)

    def _mine(
        self, rows: np.ndarray, carries: str = _BOTH, shared: bool = True, urgent: bool = False
    ) -> ProcessGroup:
        """Make a process group of each row of ranks; -> the one that this rank is in.

        shared: one that is there already will do.  urgent: what goes over it is not to wait for what computes.
        A rank in none of them gets a placeholder that it never uses.
        """
        if rows.shape[1] == 1:
            return self.everyone if self.size == 1 else ProcessGroup(dist.HashStore(), 0, 1)
        mine: Any = None
        for row in rows.tolist():
            there = self._groups.setdefault(tuple(sorted(row)), [])
            fitting = [each for each in there if each.carries in (carries, _BOTH) and each.urgent >= urgent]
            if not (shared and fitting):
                fitting = [_Group(self._new(row, carries, urgent), carries, urgent)]
                there += fitting if shared else []
            mine = fitting[0].group if self.rank in row else mine
        return mine

    def _new(self, ranks: list[int], carries: str, urgent: bool) -> Any:
        if self.device.type != "cuda":
            return dist.new_group(ranks)
        if not urgent:
            return dist.new_group(ranks, backend=carries)
        # In backward the sum of an input's gradient over the tensor group and the product that is the weight's
        # gradient are ready at the same moment. On a stream of usual priority the sum would wait until all of the
        # product's blocks have had their turn, and what is computed next would wait for the sum; on one of high
        # priority it takes the first multiprocessors that become free.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        # Torch warns where the group's timeout is not that of the options.
        return dist.new_group(ranks, timeout=options._timeout, backend=carries, pg_options=options)

    def tensor_blocks(self, size: int) -> ProcessGroup:
        """This rank's block, where tensor groups are cut into blocks of `size` neighbors. Called by all ranks."""
        block = self._mine(self.ranks.reshape(-1, size))
        self._use(block)
        return block

    def _connect(self) -> None:
        """Use every group and channel that carries the device's tensors once, in one order on all ranks.

        NCCL makes a communicator at its first use and waits there for the other ranks; in the middle of a
        schedule, where the others may wait for what this rank does next, that could be forever.
        """
        self._used: set[ProcessGroup] = set()
        for group in (self.everyone, self.tensor, self.data, self.replicas, self.embedding):
            if group is not None:
                self._use(group)
        for (direction, wraps), channel in self.channels.items():
            for stage in range(self.pipeline_size):
                following = (stage + 1) % self.pipeline_size
                if wraps == (following == 0):
                    self._transfer(
                        channel, *((stage, following) if direction == "forward" else (following, stage))
                    )

    def _use(self, group: ProcessGroup) -> None:
        if not is_alone(group) and group not in self._used:
            dist.all_reduce(self._token(), group=group)
            self._used.add(group)

    @property
    def communicators(self) -> Communicators:
        """Of this rank, where the mesh is on GPUs: of its groups, and to and from either neighbor in the pipeline."""
        return Communicators(len(self._used), len(self.channels))

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


class _Group(NamedTuple):
    group: Any  # or a placeholder, where this rank is not in it
    carries: str
    urgent: bool = False


def whole_world() -> ProcessGroup:
    """All ranks that torchrun or Slurm has started, before there is a mesh."""
    group = dist.group.WORLD
    assert isinstance(group, ProcessGroup), "start_process_group has been called"
    return group


@contextmanager
def process_group(kind: str = "auto") -> Iterator[torch.device]:
    """The world, for the time of the block; -> this rank's device. kind: run.device."""
    device = start_process_group(kind)
    try:
        with failures_end_all_ranks():
            yield device
    except BaseException:
        # NCCL would wait here for collectives that the other ranks may never join; the process ends anyway.
        if device.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def device_of_this_process(kind: str = "auto") -> torch.device:
    """run.device: of `cuda` the GPU of this process's number on its host, `auto`: the CPU where there is none.

    Raises InputError where there is no GPU for each of the host's processes.
    """
    gpus = 0 if kind == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()
    if not gpus and kind == "cuda":
        raise InputError("run.device: cuda, but there is no GPU that torch can use; auto takes the CPU then")
    if not gpus:
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), rank + 1)
    if processes > gpus:
        raise InputError(
            f"run.device: {kind}, but there are {processes} processes on this machine and "
            f"{counted(gpus, 'GPU')}; start one for each, or set run.device=cpu"
        )
    return torch.device("cuda", rank)


def start_process_group(kind: str = "auto") -> torch.device:
    """Join the world that the environment describes (RANK and WORLD_SIZE; none: a world of one); -> this rank's device.

    GPUs talk through NCCL, with gloo beside it for small messages between hosts; CPUs through gloo. kind: run.device.
    """
    device = device_of_this_process(kind)
    prepare_for_many_ranks()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = _BOTH
    else:
        backend = _HOST
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    meet()
    return device


def prepare_for_many_ranks() -> None:
    """Before a process group is made: let gloo connect two ranks when they first talk, and allow as many connections
    as the system does.

    Without this every rank connects to every other of each of its groups, and reads from the one store a record from
    each of them that is as long as the group: of n ranks in all n^3 bytes.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def meet() -> None:
    """Wait until all ranks have joined the world.

    init_process_group returns when this rank's connections stand. Were it to end at once, as it does on bad
    input, a rank that is still connecting to it would fail with an error of gloo's, not with this one's.
    """
    dist.all_reduce(torch.zeros(1))
