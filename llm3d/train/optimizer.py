"""AdamW over the shards of a rank's flat parameters, with fp32 master weights."""

from __future__ import annotations

import torch
from torch import Tensor

from llm3d.config import OptimConfig
from llm3d.kernels.adamw import adamw_
from llm3d.parallel.zero.flat import FlatParameters


class Optimizer:
    """Steps this rank's shard of each unit of `flat`.

    master: fp32, laid out like `flat.parameters`; the same tensors where those are fp32.
    exp_avg, exp_avg_sq: fp32, laid out alike, the moments. Weight decay spares the vectors (norms).
    """

    def __init__(self, flat: FlatParameters, config: OptimConfig) -> None:
        self.flat, self.config = flat, config
        self._separate = flat.dtype != torch.float32  # master weights from parameters
        self.master = [p.float() if self._separate else p for p in flat.parameters]
        self.exp_avg = [torch.zeros_like(master) for master in self.master]
        self.exp_avg_sq = [torch.zeros_like(master) for master in self.master]
        # Where the kernel reads them: on the device.
        self._step = torch.zeros((), dtype=torch.int64, device=flat.mesh.device)
        self._lr = torch.zeros((), dtype=torch.float64, device=flat.mesh.device)

    def step(self, lr: float, gradient_scale: Tensor) -> None:
        """One step from `flat.gradients` times gradient_scale; then the parameters are the master weights, rounded.

        gradient_scale: fp64 scalar on the device. What other ranks need of a unit leaves while the next is stepped.
        """
        self._step += 1
        self._lr.fill_(lr)
        for i, unit in enumerate(self.flat.units):
            split = unit.decayed()
            self._update(i, slice(0, split), self.config.weight_decay, gradient_scale)
            self._update(i, slice(split, None), 0.0, gradient_scale)
            self.flat.publish(unit)

    def _update(self, i: int, part: slice, weight_decay: float, gradient_scale: Tensor) -> None:
        unit = self.flat.units[i]
        if not len(self.master[i][part]):
            return
        adamw_(
            self.master[i][part],
            self.exp_avg[i][part],
            self.exp_avg_sq[i][part],
            unit.gradients[part],
            unit.parameters[part] if self._separate else None,
            self._step,
            self._lr,
            gradient_scale,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=weight_decay,
        )

    def publish(self) -> None:
        """Round the master weights into the model's parameters, after they were written from elsewhere."""
        for unit, master in zip(self.flat.units, self.master, strict=True):
            if self._separate:
                unit.parameters.copy_(master)
            self.flat.publish(unit)

    @property
    def state(self) -> dict[str, list[Tensor]]:
        """What a checkpoint holds beside the model's weights: fp32 tensors laid out like `flat.parameters`."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {"master": self.master, **moments} if self._separate else moments

    @property
    def steps_taken(self) -> int:
        """The count that bias correction uses."""
        return int(self._step)

    def set_steps_taken(self, steps: int) -> None:
        """Set the count that bias correction uses, after a checkpoint was loaded."""
        self._step.fill_(steps)
