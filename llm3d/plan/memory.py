"""Bytes a rank, by kind, found by running a step on paper.

The trainer is made on the meta device, where tensors have shapes and no memory, in a world of the fake process group,
where messages arrive at once. The real schedule then runs, and what lives is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # the only place that has it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from llm3d.config import Config
from llm3d.kernels.paper import is_cuda, standing_for
from llm3d.parallel.mesh import Communicators, Mesh
from llm3d.parallel.schedules import Schedule
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.stages.stage import ModelRole
from llm3d.train.trainer import ShardedModel, Trainer

META = torch.device("meta")

# Of NCCL, bytes of the buffer of a connection in one channel: for its protocols LL, 8 lines of 16 bytes for each of 512
# threads; LL128, 120 words of 8 bytes for each of 640; both times 8 steps; and Simple, 4 MiB.
_CONNECTION_BYTES = 8 * 8 * 512 * 16 + 8 * 120 * 640 * 8 + 2**22
_NCCL_CHANNELS = 16  # what it takes between 8 GPUs on NVLink, with the network's links in use: 2 to 32


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, at the step's peak. Not in it: the CUDA context, libraries' workspaces, fragmentation."""

    parameters: int
    gradients: int
    master: int
    moments: int  # and the average of the weights, where one is kept
    buffers: int  # ZeRO's: units gathered or being summed
    activations: int  # all else: kept for backward, passing through, and between stages
    communicators: int  # NCCL's buffers; an estimate, see bytes_of_communicators
    on_host: int  # master weights and moments there, and what passes through

    @property
    def on_device(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)) - self.on_host


def memory_of_stages(
    trained: ModelRole, world_size: int, device_type: str = "cuda", frozen: Sequence[ModelRole] = ()
) -> list[Memory]:
    """For each pipeline stage what its first rank holds, of those the one with most. device_type: cuda or cpu.

    frozen: models that stand beside the trained one; of these, parameters are counted.
    """
    pipeline = trained.config.parallel.pipeline
    with standing_for(device_type):
        return [
            _memory_of_rank(trained, world_size, stage * (world_size // pipeline), frozen)
            for stage in range(pipeline)
        ]


def _memory_of_rank(role: ModelRole, world_size: int, rank: int, frozen: Sequence[ModelRole]) -> Memory:
    config = role.config
    with world_on_paper(world_size, rank):
        mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, META)
        trainer = Trainer(config, mesh, role.objective)
        if role.averaged:
            trainer.optimizer.start_average()
        models = [trainer, *(ShardedModel(other.config, mesh, other.objective) for other in frozen)]
        microbatch = role.microbatch.to(META)
        batches = [microbatch] * _enough_microbatches(config, world_size, role.microbatch.num_samples)
        counter = _Counter(trainer.flat)
        with counter:
            trainer.flat.begin_step(len(batches))
            trainer.pipeline.run(batches, trainer.objective)
            trainer.flat.finish_gradients()
        parameters = sum(_bytes_of_parameters(model.flat) for model in models)
        memory = _summed_up(trainer, counter, parameters)
        on_gpu = is_cuda(microbatch.tokens)
        return replace(memory, communicators=bytes_of_communicators(mesh.communicators) if on_gpu else 0)


def bytes_of_communicators(of_rank: Communicators) -> int:
    """On the device, about: channels x connections x buffers of a connection.

    A communicator of a group receives from a neighbor in the ring and from another in the tree, in each of 16
    channels; one with a single peer, over which all goes one way, receives or sends in each. A connection has 9.2 MiB
    of buffers in a channel. That is 294 MiB, and 147 MiB with a single peer; NCCL_MAX_NCHANNELS and NCCL_BUFFSIZE
    lessen it. What is right depends on NCCL's version and on the links: take it for half to twice as much.
    """
    connections = 2 * of_rank.collective + of_rank.pair
    return connections * _NCCL_CHANNELS * _CONNECTION_BYTES


def _enough_microbatches(config: Config, world_size: int, samples_in_each: int) -> int:
    """Of a step's microbatches, as many as it takes until its memory repeats itself."""
    schedule = Schedule.of(config.parallel)
    count = -(-config.batch.global_size // (samples_in_each * config.data_parallel_size(world_size)))
    count = -(-count // schedule.microbatch_multiple) * schedule.microbatch_multiple
    few = min(count, 2 * schedule.placement.num_stages)
    return few if schedule.max_in_flight(few) == schedule.max_in_flight(count) else count


@contextmanager
def world_on_paper(size: int, rank: int) -> Iterator[None]:
    """A process group of so many ranks in which messages arrive at once, seen from one of them."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Counter(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, until they are gone.

    peak, buffers_at_peak: of those bytes and of the whole units that ZeRO gathers; and how much of it is ZeRO's.
    """

    def __init__(self, flat: FlatParameters) -> None:
        super().__init__()
        self.flat = flat
        self.live = self.peak = self.buffers_at_peak = 0
        # What has been there before, or comes and goes without an operation, is counted by other means.
        self.seen: Any = WeakIdKeyDictionary()
        self.units = [*flat.units, *flat.frozen]
        for tensor in (*(t for unit in self.units for t in (unit.whole, unit.parameters)), *flat.gradients):
            self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = True
        self.live += size
        weakref.finalize(storage, self._gone, size)
        gathered = sum(unit.whole.untyped_storage().nbytes() for unit in self.units if unit.frees)
        if self.live + gathered > self.peak:
            self.peak = self.live + gathered
            self.buffers_at_peak = gathered + self.flat.bytes_of_passing_gradients()

    def _gone(self, size: int) -> None:
        self.live -= size


def _bytes_of_parameters(flat: FlatParameters) -> int:
    """Without what comes and goes."""
    return _bytes([unit.parameters if unit.frees else unit.whole for unit in (*flat.units, *flat.frozen)])


def _summed_up(trainer: Trainer, counter: _Counter, parameters: int) -> Memory:
    flat, optimizer = trainer.flat, trainer.optimizer
    separate = [
        None if master is parameters else master
        for master, parameters in zip(optimizer.master, flat.parameters, strict=True)
    ]
    average: Sequence[Tensor | None] = optimizer.average or [None] * len(separate)
    states = list(zip(separate, optimizer.exp_avg, optimizer.exp_avg_sq, average, strict=True))
    here = [state for i, state in enumerate(states) if i not in optimizer.on_host]
    there = [tensor for i in optimizer.on_host for tensor in states[i]]
    return Memory(
        parameters=parameters,
        gradients=_bytes(flat.kept_gradients),
        master=_bytes([master for master, *_ in here]),
        moments=_bytes([moment for _, *moments in here for moment in moments]),
        buffers=counter.buffers_at_peak,
        activations=counter.peak - counter.buffers_at_peak,
        communicators=0,
        on_host=_bytes(there) + (optimizer.offload.nbytes if optimizer.offload else 0),
    )


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def table(config: Config, world_size: int, stages: Sequence[Memory]) -> str:
    """Lines for people: a column for each pipeline stage, in GiB."""
    names = {
        "parameters": "parameters",
        "gradients": "gradients",
        "master": "master weights",
        "moments": "moments",
        "buffers": "ZeRO's buffers",
        "activations": "activations",
        "communicators": "NCCL (estimate)",
        "on_device": "on the device",
        "on_host": "in host memory",
    }
    data = config.data_parallel_size(world_size)
    layout = f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x data {data}"
    adapters = f", adapters of rank {config.lora.rank}" if config.lora.rank else ""
    lines = [
        f"{config.model.num_parameters(config.head):,} parameters{adapters}, {layout}, "
        f"zero.stage {config.zero.stage}, {config.precision.compute}; GiB a rank at the peak of a step",
        f"{'':16}" + "".join(f"{f'stage {i}':>12}" for i in range(len(stages))),
    ]
    for field, name in names.items():
        lines.append(f"{name:16}" + "".join(f"{getattr(stage, field) / 2**30:12.3f}" for stage in stages))
    lines.append("without the CUDA context, libraries' workspaces and what the allocator loses to fragments")
    return "\n".join(lines)
