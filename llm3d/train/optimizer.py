"""AdamW over the shards of a rank's flat parameters, with fp32 master weights, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from llm3d.config import OptimConfig, ZeroConfig
from llm3d.kernels.adamw import adamw_
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.parallel.zero.offload import Chunk, Offload
from llm3d.parallel.zero.unit import FlatUnit


class Optimizer:
    """Steps this rank's shard of each unit of `flat`.

    master: fp32, laid out like `flat.parameters`; the same tensors where those are fp32 and beside them.
    exp_avg, exp_avg_sq: laid out alike, the moments, fp32 or bf16 (rounded stochastically, the same in every run).
    Weight decay spares the vectors (norms).
    With zero.offload the state of the last units, zero.offload_fraction of all elements, is in host memory.
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
        mesh, zero = flat.mesh, zero or ZeroConfig()
        self.seed = seed * mesh.pipeline_size * mesh.tensor_size + mesh.model.rank()
        self.num_on_device = units_on_device(flat, zero)
        self.offload: Offload | None = None
        if self.num_on_device < len(flat.units):
            self.offload = Offload(mesh.device, flat.dtype, staged=mesh.device.type == "cuda")
        self.master = [self._master_of(i) for i in range(len(flat.units))]
        self.exp_avg, self.exp_avg_sq = (
            [self._zeros(i, moments) for i in range(len(flat.units))] for _ in range(2)
        )
        # Where the kernel reads them: step and learning rate on each device that has master weights.
        self._clocks = {
            device: (
                torch.zeros((), dtype=torch.int64, device=device),
                torch.zeros((), dtype=torch.float64, device=device),
            )
            for device in {master.device for master in self.master}
        }
        self._steps_taken = 0

    def _on_host(self, i: int) -> bool:
        return i >= self.num_on_device

    def _zeros(self, i: int, dtype: torch.dtype) -> Tensor:
        parameters = self.flat.parameters[i]
        if self._on_host(i):
            assert self.offload is not None
            return self.offload.zeros(len(parameters), dtype)
        return torch.zeros_like(parameters, dtype=dtype)

    def _master_of(self, i: int) -> Tensor:
        """The parameters themselves where they can serve."""
        parameters = self.flat.parameters[i]
        if parameters.dtype == torch.float32 and not self._on_host(i):
            return parameters
        return self._zeros(i, torch.float32).copy_(parameters)

    def step(self, lr: float, gradient_scale: Tensor) -> None:
        """One step from `flat.gradients` times gradient_scale; then the parameters are the master weights, rounded.

        gradient_scale: fp64 scalar on the device. What other ranks need of a unit leaves while the next is stepped.
        """
        self.set_steps_taken(self._steps_taken + 1)
        for _, rate in self._clocks.values():
            rate.fill_(lr)
        for i, unit in enumerate(self.flat.units[: self.num_on_device]):
            for part, decay in self._parts(unit):
                into = None if self.master[i] is unit.parameters else unit.parameters[part]
                self._update(i, part, decay, gradient_scale, unit.gradients[part], into)
            self.flat.publish(unit)
        if self.offload is not None:
            self.offload.run(list(self._chunks(gradient_scale.cpu())))

    def _parts(self, unit: FlatUnit) -> list[tuple[slice, float]]:
        """A shard's matrices and its vectors, each with their weight decay."""
        split = unit.decayed()
        parts = [(slice(0, split), self.config.weight_decay), (slice(split, unit.shard_size), 0.0)]
        return [(part, decay) for part, decay in parts if part.start < part.stop]

    def _chunks(self, gradient_scale: Tensor) -> Iterator[Chunk]:
        assert self.offload is not None
        for i, unit in list(enumerate(self.flat.units))[self.num_on_device :]:
            for whole, decay in self._parts(unit):
                for part in self.offload.ranges(whole.start, whole.stop):
                    step = partial(self._update, i, part, decay, gradient_scale)
                    after = partial(self.flat.publish, unit) if part.stop == unit.shard_size else None
                    yield Chunk(
                        unit.gradients[part], unit.parameters[part], self.master[i][part], step, after
                    )

    def _update(
        self,
        i: int,
        part: slice,
        weight_decay: float,
        gradient_scale: Tensor,
        gradient: Tensor,
        parameter: Tensor | None,
    ) -> None:
        master = self.master[i]
        adamw_(
            master[part],
            self.exp_avg[i][part],
            self.exp_avg_sq[i][part],
            gradient,
            parameter,
            *self._clocks[master.device],
            gradient_scale,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=weight_decay,
            seed=self.seed,
            offset=sum(unit.size for unit in self.flat.units[:i]) + self.flat.units[i].start + part.start,
        )

    def publish(self) -> None:
        """Round the master weights into the model's parameters, after they were written from elsewhere."""
        for unit, master in zip(self.flat.units, self.master, strict=True):
            if master is not unit.parameters:
                unit.parameters.copy_(master)
            self.flat.publish(unit)

    @property
    def state(self) -> dict[str, list[Tensor]]:
        """What a checkpoint holds beside the model's weights: tensors laid out like `flat.parameters`."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
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


def units_on_device(flat: FlatParameters, zero: ZeroConfig) -> int:
    """How many units, from the first, keep their optimiser state on the device: the first to be needed again."""
    if zero.offload == "none":
        return len(flat.units)
    wanted = (1 - zero.offload_fraction) * sum(unit.shard_size for unit in flat.units)
    count, kept = 0, 0
    while count < len(flat.units) and kept + flat.units[count].shard_size <= wanted:
        kept += flat.units[count].shard_size
        count += 1
    return count
