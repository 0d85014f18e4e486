"""The flat optimizer is PyTorch's AdamW, parameter by parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm3d.config import OptimConfig, ZeroConfig
from llm3d.parallel.boxes import Box, Piece, ShardedParameter
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.train.optimizer import Optimizer
from tests.pool import spawn

SHAPES = {"matrix": (5, 3), "norm": (7,), "other": (2, 9)}


def module() -> Any:
    made: Any = torch.nn.Module()
    for name, shape in SHAPES.items():
        made.register_parameter(name, ShardedParameter.on_meta([Piece(Box.whole(name, shape))]))
    made.units = lambda: [made]
    return made


OFFLOADED = ZeroConfig(offload="optimizer")


@spawn(world_size=1)
@pytest.mark.parametrize("zero", [ZeroConfig(), OFFLOADED], ids=["device", "host"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_are_those_of_adamw_with_decay_on_matrices_alone(
    mesh: Mesh, dtype: torch.dtype, scale: float, zero: ZeroConfig
) -> None:
    config = OptimConfig(lr=1.0, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3)
    flat = FlatParameters([module()], mesh, dtype)
    optimizer = Optimizer(flat, config, zero)
    torch.manual_seed(0)
    for master in optimizer.master:
        master.normal_()
    optimizer.copy_to_parameters()
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


def trained(mesh: Mesh, zero: ZeroConfig, moments: torch.dtype, seed: int = 0) -> Optimizer:
    """Three steps of three units of 4,096 elements in bf16."""
    stage: Any = torch.nn.Module()
    for name in "abc":
        part = torch.nn.Module()
        part.register_parameter("weight", ShardedParameter.on_meta([Piece(Box.whole(name, (64, 64)))]))
        stage.add_module(name, part)
    stage.units = lambda: list(stage.children())
    flat = FlatParameters([stage], mesh, torch.bfloat16, gradient_dtype=torch.bfloat16)
    optimizer = Optimizer(flat, OptimConfig(lr=1.0), zero, moments, seed)
    generator = torch.Generator().manual_seed(0)
    for master in optimizer.master:
        master.normal_(generator=generator)
    for _ in range(3):
        for gradient in flat.gradients:
            gradient.normal_(generator=generator)
        optimizer.step(0.1, torch.tensor(0.5, dtype=torch.float64))
    return optimizer


@spawn(world_size=1)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fraction", "on_device"), [(1.0, 0), (0.5, 1), (0.1, 2)])
def test_where_the_state_is_changes_nothing(
    mesh: Mesh, moments: torch.dtype, fraction: float, on_device: int
) -> None:
    zero = ZeroConfig(offload="optimizer", offload_fraction=fraction)
    there, here = trained(mesh, zero, moments), trained(mesh, ZeroConfig(), moments)
    assert (3 - len(there.on_host), 3 - len(here.on_host)) == (on_device, 3)
    for name, expected in here.state.items():
        for actual, value in zip(there.state[name], expected, strict=True):
            assert torch.equal(actual, value)
    for actual, value in zip(there.flat.parameters, here.flat.parameters, strict=True):
        assert torch.equal(actual, value)


@spawn(world_size=1)
def test_narrow_moments_are_near_wide_ones_and_drawn_from_the_seed(mesh: Mesh) -> None:
    wide = trained(mesh, ZeroConfig(), torch.float32)
    narrow, again, other = (trained(mesh, ZeroConfig(), torch.bfloat16, seed) for seed in (0, 0, 1))
    assert narrow.exp_avg[0].dtype == narrow.exp_avg_sq[0].dtype == torch.bfloat16
    for i in range(3):
        torch.testing.assert_close(narrow.exp_avg[i].float(), wide.exp_avg[i], rtol=0.03, atol=1e-2)
        assert torch.equal(narrow.exp_avg[i], again.exp_avg[i])
        assert not torch.equal(narrow.exp_avg[i], other.exp_avg[i])
