"""AdamW over flat tensors with fp32 master weights. Loshchilov and Hutter 2019."""

from __future__ import annotations

import torch
from torch import Tensor

from llm3d.config import OptimConfig
from llm3d.parallel.flat import FlatParameters


class Optimizer:
    """Steps a rank's flat parameters by PyTorch's fused AdamW.

    master: fp32 [n], laid out like `flat.parameters`; the same tensor where those are fp32.
    exp_avg, exp_avg_sq: fp32 [n], the moments. Weight decay spares the vectors (norms).
    """

    def __init__(self, flat: FlatParameters, config: OptimConfig) -> None:
        self.flat = flat
        parameters = flat.parameters
        self.master = parameters if parameters.dtype == torch.float32 else parameters.float()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        split = flat.num_decayed
        groups = [
            {"params": [self._part(slice(0, split))], "weight_decay": config.weight_decay},
            {"params": [self._part(slice(split, None))], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for group, part in zip(self.adamw.param_groups, (slice(0, split), slice(split, None)), strict=True):
            self.adamw.state[group["params"][0]] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameters.device),
                "exp_avg": self.exp_avg[part],
                "exp_avg_sq": self.exp_avg_sq[part],
            }

    def _part(self, part: slice) -> Tensor:
        parameter = self.master[part].detach().requires_grad_()
        parameter.grad = self.flat.gradients[part]
        return parameter

    def step(self, lr: float) -> None:
        """One step from `flat.gradients`; then the parameters are the master weights, rounded."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.publish()

    def publish(self) -> None:
        """Round the master weights into the model's parameters."""
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
        return int(next(iter(self.adamw.state.values()))["step"])

    def set_steps_taken(self, steps: int) -> None:
        """Set the count that bias correction uses, after a checkpoint was loaded."""
        for state in self.adamw.state.values():
            state["step"].fill_(steps)
