"""AdamW over flat tensors with fp32 master weights."""

from __future__ import annotations

import torch
from torch import Tensor

from llm3d.config import OptimConfig
from llm3d.kernels.adamw import adamw_
from llm3d.parallel.flat import FlatParameters


class Optimizer:
    """Steps a rank's flat parameters.

    master: fp32 [n], laid out like `flat.parameters`; the same tensor where those are fp32.
    exp_avg, exp_avg_sq: fp32 [n], the moments. Weight decay spares the vectors (norms).
    """

    def __init__(self, flat: FlatParameters, config: OptimConfig) -> None:
        self.flat, self.config = flat, config
        parameters = flat.parameters
        self.master = parameters if parameters.dtype == torch.float32 else parameters.float()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        # Where the kernel reads them: on the device.
        self._step = torch.zeros((), dtype=torch.int64, device=parameters.device)
        self._lr = torch.zeros((), dtype=torch.float64, device=parameters.device)

    def step(self, lr: float, gradient_scale: Tensor) -> None:
        """One step from `flat.gradients` times gradient_scale; then the parameters are the master weights, rounded.

        gradient_scale: fp64 scalar on the device.
        """
        self._step += 1
        self._lr.fill_(lr)
        split = self.flat.num_decayed
        self._update(slice(0, split), self.config.weight_decay, gradient_scale)
        self._update(slice(split, None), 0.0, gradient_scale)

    def _update(self, part: slice, weight_decay: float, gradient_scale: Tensor) -> None:
        parameters = self.flat.parameters
        adamw_(
            self.master[part],
            self.exp_avg[part],
            self.exp_avg_sq[part],
            self.flat.gradients[part],
            None if parameters is self.master else parameters[part],
            self._step,
            self._lr,
            gradient_scale,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=weight_decay,
        )

    def publish(self) -> None:
        """Round the master weights into the model's parameters, after they were written from elsewhere."""
        if self.flat.parameters is not self.master:
            self.flat.parameters.copy_(self.master)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the model's weights: flat fp32 tensors."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return moments if self.flat.parameters is self.master else {"master": self.master, **moments}

    @property
    def steps_taken(self) -> int:
        """The count that bias correction uses."""
        return int(self._step)

    def set_steps_taken(self, steps: int) -> None:
        """Set the count that bias correction uses, after a checkpoint was loaded."""
        self._step.fill_(steps)
