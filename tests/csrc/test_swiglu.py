"""What the CUDA kernels of SwiGLU compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.csrc.conftest import Ops
from tests.csrc.placing import DTYPES, PLACES, assert_same, placed
from tests.kernels.exactness import assert_close, assert_exact, randn
from tests.kernels.references import swiglu_by_autograd

SHAPES = [(0, 8), (1, 1), (5, 13), (3, 0), (7, 344), (2, 5000)]  # tokens, intermediate


def results(ops: Ops, gate_up: Tensor, grad: Tensor, place: str) -> tuple[Tensor, Tensor]:
    gate_up = placed(gate_up, place)
    out = ops.swiglu_forward(gate_up)
    ops.swiglu_backward_(placed(grad, place), gate_up)
    return out, gate_up.clone()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(cuda: Ops, shape: tuple[int, int], dtype: torch.dtype, place: str) -> None:
    exact = randn(shape[0], 2 * shape[1], scale=3.0), randn(*shape, seed=1)
    inputs = exact[0].to(dtype), exact[1].to(dtype)
    ours = results(cuda, *inputs, place)
    assert_same(results(cuda, *inputs, place), ours)
    for own, theirs, expected in zip(
        ours, swiglu_by_autograd(*inputs), swiglu_by_autograd(*exact), strict=True
    ):
        assert_exact(own, theirs, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_is_that_of_the_cpu(cuda: Ops, native: Ops, dtype: torch.dtype) -> None:
    inputs = randn(5, 2 * 123, scale=3.0).to(dtype), randn(5, 123, seed=1).to(dtype)
    cpu = results(native, *inputs, "contiguous")
    for own, theirs in zip(results(cuda, *inputs, "contiguous"), cpu, strict=True):
        assert_close(own, theirs.double(), max(2e-6, torch.finfo(dtype).eps))


def test_gates_far_from_zero_and_nan(cuda: Ops) -> None:
    gate_up = torch.tensor([[200.0, -200.0, torch.nan, 1.0] + [2.0] * 4])
    out, gradient = results(cuda, gate_up, torch.ones(1, 4), "contiguous")
    assert out[0, :2].tolist() == [400.0, 0.0] and out[0, 2].isnan() and torch.isfinite(out[0, 3])
    assert gradient[0, :2].tolist() == [2.0, 0.0] and gradient[0, 2].isnan()
