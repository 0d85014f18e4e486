"""AdamW over the shards of a rank's flat parameters, with fp32 master weights, on the device or in host memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llm3d.config import OptimConfig, ZeroConfig
from llm3d.kernels.adamw import adamw_
from llm3d.kernels.paper import is_cuda
from llm3d.parallel.boxes import Box
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.parallel.zero.offload import Chunk, Offload
from llm3d.parallel.zero.unit import FlatUnit

AVERAGE = "average"  # the name of an average of the weights among what checkpoints hold


class Optimizer:
    """Steps this rank's shard of each unit of `flat`.

    master: fp32, laid out like `flat.parameters`; the same tensors where those are fp32 and beside them.
    exp_avg, exp_avg_sq: laid out alike, the moments, fp32 or bf16 (rounded stochastically, the same in every run).
    Weight decay spares the vectors (norms).
    With zero.offload the state of whole units, about zero.offload_fraction of all elements, is in host memory.
    """

    def __init__(
        self,
        flat: FlatParameters,
        config: OptimConfig,
        zero: ZeroConfig | None = None,
        moments: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.flat, self.config = flat, config
        self.on_host = units_on_host(flat, zero or ZeroConfig())
        self.offload: Offload | None = None
        if self.on_host:
            staged = is_cuda(flat.parameters[0])
            self.offload = Offload(flat.mesh.device, flat.dtype, staged)
        self._parts = [_parts_of(unit, config.weight_decay, moments, seed) for unit in flat.units]
        self.master = [self._master_of(i) for i in range(len(flat.units))]
        self.exp_avg, self.exp_avg_sq = (
            [self._zeros(i, moments) for i in range(len(flat.units))] for _ in range(2)
        )
        self.average: list[Tensor] | None = None  # of the master weights over the steps, laid out like them
        # Where the kernel reads them: step and learning rate on each device that has master weights.
        self._clocks = {
            device: (
                torch.zeros((), dtype=torch.int64, device=device),
                torch.zeros((), dtype=torch.float64, device=device),
            )
            for device in {master.device for master in self.master}
        }
        self._steps_taken = 0

    def _zeros(self, i: int, dtype: torch.dtype) -> Tensor:
        parameters = self.flat.parameters[i]
        if i in self.on_host:
            assert self.offload is not None
            return self.offload.zeros(len(parameters), dtype)
        return torch.zeros_like(parameters, dtype=dtype)

    def _master_of(self, i: int) -> Tensor:
        """The parameters themselves where they can serve."""
        parameters = self.flat.parameters[i]
        if parameters.dtype == torch.float32 and i not in self.on_host:
            return parameters
        return self._zeros(i, torch.float32).copy_(parameters)

    def step(self, lr: float, gradient_scale: Tensor) -> None:
        """One step from `flat.gradients` times gradient_scale; then the parameters are the master weights, rounded.

        gradient_scale: fp64 scalar on the device. Where it is not finite, nothing changes but the count of steps: see
        `forget_step`. What other ranks need of a unit leaves while the next is stepped. No host waits, but for what is
        offloaded.
        """
        self.set_steps_taken(self._steps_taken + 1)
        for _, rate in self._clocks.values():
            rate.fill_(lr)
        for i, unit in enumerate(self.flat.units):
            if i not in self.on_host:
                for part in self._parts[i]:
                    into = None if self.master[i] is unit.parameters else unit.parameters[part.where]
                    self._update(i, part, gradient_scale, unit.gradients[part.where], into)
                self.flat.all_gather_parameters(unit)
        if self.offload is not None:
            on_host = gradient_scale.cpu()
            if torch.isfinite(on_host):
                self.offload.run(list(self._chunks(on_host)))

    def forget_step(self) -> None:
        """Have the last step, which changed nothing, not count."""
        self.set_steps_taken(self._steps_taken - 1)

    def _chunks(self, gradient_scale: Tensor) -> Iterator[Chunk]:
        assert self.offload is not None
        for i in sorted(self.on_host):
            unit = self.flat.units[i]
            for part in self._parts[i]:
                for where in self.offload.ranges(part.where.start, part.where.stop):
                    number = part.number + where.start - part.where.start
                    step = partial(self._update, i, part._replace(where=where, number=number), gradient_scale)
                    after = (
                        partial(self.flat.all_gather_parameters, unit)
                        if where.stop == unit.shard_size
                        else None
                    )
                    shards = (unit.gradients[where], unit.parameters[where], self.master[i][where])
                    yield Chunk(*shards, step, after)

    def _update(
        self, i: int, part: _Part, gradient_scale: Tensor, gradient: Tensor, parameter: Tensor | None
    ) -> None:
        master, where = self.master[i], part.where
        adamw_(
            master[where],
            self.exp_avg[i][where],
            self.exp_avg_sq[i][where],
            gradient,
            parameter,
            *self._clocks[master.device],
            gradient_scale,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=part.weight_decay,
            seed=part.seed,
            offset=part.number,
        )

    def copy_to_parameters(self) -> None:
        """Round the master weights into the model's parameters, after they were written from elsewhere."""
        for unit, master in zip(self.flat.units, self.master, strict=True):
            if master is not unit.parameters:
                unit.parameters.copy_(master)
            self.flat.all_gather_parameters(unit)

    def start_average(self) -> None:
        """From the master weights as they are."""
        self.average = [master.clone() for master in self.master]

    def update_average(self, kept: float) -> None:
        """average <- kept average + (1 - kept) master, where an average is kept."""
        for average, master in zip(self.average or (), self.master, strict=False):
            average.lerp_(master, 1 - kept)

    @property
    def state(self) -> dict[str, list[Tensor]]:
        """What a checkpoint holds beside the model's weights: tensors laid out like `flat.parameters`."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.average is not None:
            moments[AVERAGE] = self.average
        return moments if self.flat.dtype == torch.float32 else {"master": self.master, **moments}

    @property
    def steps_taken(self) -> int:
        """The count that bias correction uses."""
        return self._steps_taken

    def set_steps_taken(self, steps: int) -> None:
        """Set the count that bias correction uses, after a checkpoint was loaded."""
        self._steps_taken = steps
        for step, _ in self._clocks.values():
            step.fill_(steps)


class _Part(NamedTuple):
    """A part of a shard that is stepped in one go. seed, number: of the random bits for its first element."""

    where: slice
    weight_decay: float
    seed: int = 0
    number: int = 0


def _parts_of(unit: FlatUnit, weight_decay: float, moments: torch.dtype, seed: int) -> list[_Part]:
    """All of a shard, matrices apart from vectors; with narrow moments, box by box.

    Their rounding is drawn by the global coordinates of the box that an element is in, so that ranks that hold copies
    of it (norms, replicated heads, tied embeddings) round alike.
    """
    split = unit.decayed()
    if moments == torch.float32:
        parts = [_Part(slice(0, split), weight_decay), _Part(slice(split, unit.shard_size), 0.0)]
    else:
        parts = [
            _Part(where, weight_decay if where.start < split else 0.0, _seed(piece.box, seed), number)
            for piece, number, where in unit.spans()
        ]
        parts.append(_Part(slice(parts[-1].where.stop if parts else 0, unit.shard_size), 0.0))  # the padding
    return [part for part in parts if part.where.start < part.where.stop]


def _seed(box: Box, seed: int) -> int:
    key = f"{seed}/{box.name}/{box.offset}/{box.size}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")


def units_on_host(flat: FlatParameters, zero: ZeroConfig) -> frozenset[int]:
    """The units whose optimizer state is in host memory: those that do not fit the device's share, taken from the
    first on, which is the first to be needed again.
    """
    if zero.offload == "none":
        return frozenset()
    room = (1 - zero.offload_fraction) * sum(unit.shard_size for unit in flat.units)
    there = []
    for i, unit in enumerate(flat.units):
        if unit.shard_size <= room:
            room -= unit.shard_size
        else:
            there.append(i)
    return frozenset(there)
