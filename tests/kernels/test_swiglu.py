"""SwiGLU against fp64 autograd of silu(gate) * up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels.swiglu import swiglu
from tests.kernels.exactness import assert_as_exact_as, assert_close, randn
from tests.kernels.references import swiglu_by_autograd

SHAPES = [(1, 1), (1, 13), (17, 31), (3, 344)]


def ours(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.clone().requires_grad_()
    out = swiglu(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_is_the_definition(shape: tuple[int, int], scale: float) -> None:
    tokens, intermediate = shape
    gate_up, grad = randn(tokens, 2 * intermediate, scale=scale), randn(tokens, intermediate, seed=1)
    for actual, exact in zip(
        ours(gate_up.float(), grad.float()), swiglu_by_autograd(gate_up, grad), strict=True
    ):
        assert_close(actual, exact)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_bf16_is_as_exact_as_torch(shape: tuple[int, int]) -> None:
    tokens, intermediate = shape
    inputs = randn(tokens, 2 * intermediate), randn(tokens, intermediate, seed=1)
    narrow = [value.bfloat16() for value in inputs]
    for actual, theirs, exact in zip(
        ours(*narrow), swiglu_by_autograd(*narrow), swiglu_by_autograd(*inputs), strict=True
    ):
        assert_as_exact_as(theirs, actual, exact)


def test_gates_far_from_zero_are_open_or_shut() -> None:
    gate_up = torch.tensor([[1e4, -1e4, 3.0, 3.0]])
    out, grad = ours(gate_up, torch.ones(1, 2))
    assert out.tolist() == [[3e4, 0.0]]
    assert grad.tolist() == [[3.0, 0.0, 1e4, 0.0]]
