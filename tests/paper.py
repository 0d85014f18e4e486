"""A training step on paper: of tensors without data, which take the ways that tensors on a GPU take.

There no tensor has a value: what asks for one, as a host that waits for a GPU does, fails.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from llm3d.config import Config
from llm3d.kernels import backend
from llm3d.parallel.mesh import Mesh
from llm3d.plan.memory import META, world_on_paper
from llm3d.train.objective import Objective
from llm3d.train.trainer import Notice, Trainer

NEEDS_KERNELS = pytest.mark.skipif(
    backend.fused("adamw_", torch.empty(0, device=META)) is None,
    reason="plain PyTorch in place of kernels asks for values",
)


def step_on_paper(
    config: Config,
    objective: Objective,
    microbatch: Any,
    world_size: int = 1,
    rank: int = 0,
    watched: AbstractContextManager[Any] | None = None,
) -> list[str]:
    """A step of two rounds of microbatches; -> launched, when the optimizer is, and read, for each wait, in order.

    watched: entered for the time of the step.
    """
    happened: list[str] = []

    def read(tensor: Tensor) -> list[float]:
        happened.append("read")
        return [1.0] * len(tensor)

    def tell() -> Notice:
        happened.append("told")
        return Notice()

    with world_on_paper(world_size, rank), pytest.MonkeyPatch.context() as patch:
        trainer = Trainer(config, Mesh(config.parallel.tensor, config.parallel.pipeline, META), objective)
        launch = trainer.optimizer.step
        patch.setattr(trainer.optimizer, "step", lambda *args: (launch(*args), happened.append("launched")))
        patch.setattr(Tensor, "tolist", read)
        batches = [microbatch.to(META)] * (2 * config.parallel.pipeline)
        with watched or nullcontext():
            trainer.step(batches, 1e-3, tell)
    return happened
