"""What the CUDA kernels of SwiGLU compute, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels import backend
from tests.csrc.placing import DTYPES, PLACES, assert_exact, assert_same, placed
from tests.kernels.exactness import assert_close, randn
from tests.kernels.test_swiglu import by_autograd

Ops = torch._ops._OpNamespace
SHAPES = [(0, 8), (1, 1), (5, 13), (3, 0), (7, 344), (2, 5000)]  # tokens, intermediate


def results(ops: Ops, gate_up: Tensor, grad: Tensor, place: str) -> tuple[Tensor, Tensor]:
    gate_up = placed(gate_up, place)
    out = ops.swiglu_forward(gate_up)
    ops.swiglu_backward_(placed(grad, place), gate_up)
    return out, gate_up.clone()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(emulated: Ops, shape: tuple[int, int], dtype: torch.dtype, place: str) -> None:
    exact = randn(shape[0], 2 * shape[1], scale=3.0), randn(*shape, seed=1)
    inputs = exact[0].to(dtype), exact[1].to(dtype)
    ours = results(emulated, *inputs, place)
    assert_same(results(emulated, *inputs, place), ours)
    for own, theirs, expected in zip(ours, by_autograd(*inputs), by_autograd(*exact), strict=True):
        assert_exact(own, theirs, expected)


@pytest.mark.skipif(not backend.describe("cpu").startswith("native"), reason="no native kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_is_that_of_the_cpu(emulated: Ops, dtype: torch.dtype) -> None:
    inputs = randn(5, 2 * 123, scale=3.0).to(dtype), randn(5, 123, seed=1).to(dtype)
    cpu = results(torch.ops.llm3d, *inputs, "contiguous")
    for own, theirs in zip(results(emulated, *inputs, "contiguous"), cpu, strict=True):
        assert_close(own, theirs.double(), max(2e-6, torch.finfo(dtype).eps))


def test_gates_far_from_zero_and_nan(emulated: Ops) -> None:
    gate_up = torch.tensor([[200.0, -200.0, torch.nan, 1.0] + [2.0] * 4])
    out, gradient = results(emulated, gate_up, torch.ones(1, 4), "contiguous")
    assert out[0, :2].tolist() == [400.0, 0.0] and out[0, 2].isnan() and torch.isfinite(out[0, 3])
    assert gradient[0, :2].tolist() == [2.0, 0.0] and gradient[0, 2].isnan()
