"""RMSNorm against fp64 autograd of its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from tests.kernels.exactness import assert_as_exact_as, assert_close, randn
from tests.kernels.references import RMS_NORM_EPS, rms_norm_by_autograd

SHAPES = [(1, 1), (1, 7), (13, 31), (3, 128), (257, 96)]


def ours(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, inverse_rms = rms_norm_forward(x, weight, RMS_NORM_EPS)
    assert inverse_rms.dtype == torch.float32 and inverse_rms.shape == (len(x), 1)
    return (y, *rms_norm_backward(grad, x, weight, inverse_rms))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_is_the_definition(shape: tuple[int, int], scale: float) -> None:
    x, weight, grad = randn(*shape, scale=scale), randn(shape[1], seed=1), randn(*shape, seed=2)
    results = ours(x.float(), weight.float(), grad.float())
    exact = rms_norm_by_autograd(x, weight, grad)
    for actual, expected, size in zip(results, exact, (1.0, 1 / scale, 1.0), strict=True):
        assert actual.dtype == torch.float32
        assert float((actual - expected).abs().max()) <= 1e-5 * max(float(expected.abs().max()), size)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_bf16_is_as_exact_as_torch(shape: tuple[int, int]) -> None:
    inputs = randn(*shape), randn(shape[1], seed=1), randn(*shape, seed=2)
    narrow = [value.bfloat16() for value in inputs]
    y, grad_x, grad_weight = ours(*narrow)
    exact, theirs = rms_norm_by_autograd(*inputs), rms_norm_by_autograd(*narrow)
    assert_as_exact_as(theirs[0], y, exact[0])
    assert_as_exact_as(theirs[1], grad_x, exact[1])
    assert_close(grad_weight, exact[2])  # stays in fp32, whatever the storage


def test_a_token_of_zeros_stays_finite() -> None:
    x, weight = torch.zeros(2, 5), torch.ones(5)
    y, grad_x, grad_weight = ours(x, weight, torch.ones(2, 5))
    assert torch.equal(y, x)
    assert torch.allclose(grad_x, torch.full((2, 5), RMS_NORM_EPS**-0.5))
    assert torch.equal(grad_weight, torch.zeros(5))
