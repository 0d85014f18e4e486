"""The flat optimiser is PyTorch's AdamW, parameter by parameter."""

from __future__ import annotations

import pytest
import torch

from llm3d.config import OptimConfig
from llm3d.parallel.boxes import Box, Piece, ShardedParameter
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.train.optimizer import Optimizer
from tests.pool import spawn

SHAPES = {"matrix": (5, 3), "norm": (7,), "other": (2, 9)}


def module() -> torch.nn.Module:
    made = torch.nn.Module()
    for name, shape in SHAPES.items():
        made.register_parameter(name, ShardedParameter.on_meta([Piece(Box.whole(name, shape))]))
    made.units = lambda: [made]
    return made


@spawn(world_size=1)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_those_of_adamw_with_decay_on_matrices_alone(
    mesh: Mesh, dtype: torch.dtype, scale: float
) -> None:
    config = OptimConfig(lr=1.0, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3)
    flat = FlatParameters([module()], mesh, dtype)
    optimizer = Optimizer(flat, config)
    torch.manual_seed(0)
    for master in optimizer.master:
        master.normal_()
    optimizer.publish()
    views = {piece.box.name: (view, grad) for (piece, view), (_, grad) in both(flat, optimizer)}
    theirs = {name: view.clone().requires_grad_() for name, (view, _) in views.items()}
    oracle = torch.optim.AdamW(
        [
            {"params": [theirs["matrix"], theirs["other"]], "weight_decay": 0.3},
            {"params": [theirs["norm"]], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-3,
    )
    for step in range(3):
        for name, (_, grad) in views.items():
            grad.normal_()
            theirs[name].grad = scale * grad
        for group in oracle.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step(0.1 / (step + 1), torch.tensor(scale, dtype=torch.float64))
        oracle.step()
        for name, (view, _) in views.items():
            torch.testing.assert_close(view, theirs[name].detach())
        for parameters, master in zip(flat.parameters, optimizer.master, strict=True):
            assert torch.equal(parameters, master.to(dtype))
    assert optimizer.steps_taken == 3


def both(flat: FlatParameters, optimizer: Optimizer) -> zip:
    """Each piece of the master weights beside that of the gradients."""
    return zip(flat.pieces(optimizer.master), flat.pieces(flat.gradients), strict=True)
