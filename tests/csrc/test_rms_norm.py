"""What the CUDA kernels of RMSNorm compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.csrc.conftest import Ops
from tests.csrc.placing import DTYPES, PLACES, assert_same, placed
from tests.kernels.exactness import assert_close, assert_exact, randn
from tests.kernels.references import RMS_NORM_EPS, rms_norm_by_autograd

NARROW = [torch.bfloat16, torch.float16]

# A warp a row, a block a row (of several rows in turn), longer rows; with and without whole packs of 16 bytes.
SHAPES = [
    (0, 64),
    (1, 1),
    (1, 4096),
    (5, 123),
    (63, 41),
    (37, 128),
    (3, 4096),
    (2, 16384),
    (2, 40_000),
    (1, 40_001),
]


def norm(ops: Ops, inputs: list[Tensor], place: str) -> tuple[Tensor, ...]:
    """y, 1 / rms, grad_x and grad_weight; x + residual and its y; grad_x with another gradient added."""
    x, grad_y, residual, grad_sum = (placed(value, place) for value in inputs[:4])
    weight = placed(inputs[4], place)[:]
    y, inverse_rms = ops.rms_norm_forward(x, weight, RMS_NORM_EPS)
    assert inverse_rms.dtype == torch.float32 and inverse_rms.shape == (len(x), 1)
    gradients = ops.rms_norm_backward(grad_y, x, weight, inverse_rms, None)
    with_sum = ops.rms_norm_backward(grad_y, x, weight, inverse_rms, grad_sum)
    assert torch.equal(with_sum[1], gradients[1])
    y_of_sum, _ = ops.add_rms_norm_forward(x, residual, weight, RMS_NORM_EPS)
    return y, inverse_rms, *gradients, x.clone(), y_of_sum, with_sum[0]


def norm_inputs(shape: tuple[int, int]) -> list[Tensor]:
    return [*(randn(*shape, seed=seed) for seed in range(4)), randn(shape[1], seed=4)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(cuda: Ops, shape: tuple[int, int], dtype: torch.dtype, place: str) -> None:
    exact_inputs = norm_inputs(shape)
    inputs = [value.to(dtype) for value in exact_inputs]
    results = norm(cuda, inputs, place)
    assert_same(norm(cuda, inputs, place), results)
    y, _, grad_x, grad_weight, x_sum, y_of_sum, grad_x_sum = results
    x, grad_y, residual, grad_sum, weight = inputs
    assert torch.equal(x_sum, x + residual)
    theirs = rms_norm_by_autograd(x, weight, grad_y)
    exact = rms_norm_by_autograd(exact_inputs[0], exact_inputs[4], exact_inputs[1])
    assert_exact(y, theirs[0], exact[0])
    assert_exact(grad_x, theirs[1], exact[1])
    assert_exact(grad_x_sum, theirs[1] + grad_sum, exact[1] + exact_inputs[3])
    assert_exact(
        y_of_sum,
        rms_norm_by_autograd(x_sum, weight, grad_y)[0],
        rms_norm_by_autograd(x_sum.double(), weight.double(), grad_y.double())[0],
    )
    assert_close(grad_weight, exact[2]) if len(x) else assert_same((grad_weight,), (torch.zeros(shape[1]),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 123), (19, 4096)], ids=str)
def test_rms_norm_is_that_of_the_cpu(
    cuda: Ops, native: Ops, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = [value.to(dtype) for value in norm_inputs(shape)]
    for ours, theirs in zip(
        norm(cuda, inputs, "contiguous"), norm(native, inputs, "contiguous"), strict=True
    ):
        assert_close(ours, theirs.double(), 2 * torch.finfo(ours.dtype).eps if ours.dtype in NARROW else 2e-6)


def test_rms_norm_of_many_rows_on_few_blocks(cuda: Ops) -> None:
    x, grad_y, _, _, weight = norm_inputs((301, 24))
    inverse_rms = (x.square().mean(-1, keepdim=True) + RMS_NORM_EPS).rsqrt()
    arguments = grad_y.float(), x.float(), weight.float(), inverse_rms.float(), None
    assert_close(cuda.rms_norm_backward(*arguments)[1], rms_norm_by_autograd(x, weight, grad_y)[2])
