"""What the CUDA kernels of RMSNorm, AdamW and the gradient's norm compute, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels import backend
from tests.csrc.placing import DTYPES, PLACES, assert_exact, assert_same, placed
from tests.kernels.exactness import assert_close, error, randn
from tests.kernels.test_adamw import by_torch, scalars
from tests.kernels.test_rms_norm import EPS, by_autograd

Ops = torch._ops._OpNamespace
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def native() -> Ops:
    """torch.ops.llm3d, for the CPU."""
    if not backend.describe("cpu").startswith("native"):
        pytest.skip(backend.describe("cpu"))
    return torch.ops.llm3d


# ---- RMSNorm ----

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
    y, inverse_rms = ops.rms_norm_forward(x, weight, EPS)
    assert inverse_rms.dtype == torch.float32 and inverse_rms.shape == (len(x), 1)
    gradients = ops.rms_norm_backward(grad_y, x, weight, inverse_rms, None)
    with_sum = ops.rms_norm_backward(grad_y, x, weight, inverse_rms, grad_sum)
    assert torch.equal(with_sum[1], gradients[1])
    y_of_sum, _ = ops.add_rms_norm_forward(x, residual, weight, EPS)
    return y, inverse_rms, *gradients, x.clone(), y_of_sum, with_sum[0]


def norm_inputs(shape: tuple[int, int]) -> list[Tensor]:
    return [*(randn(*shape, seed=seed) for seed in range(4)), randn(shape[1], seed=4)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(emulated: Ops, shape: tuple[int, int], dtype: torch.dtype, place: str) -> None:
    exact_inputs = norm_inputs(shape)
    inputs = [value.to(dtype) for value in exact_inputs]
    results = norm(emulated, inputs, place)
    assert_same(norm(emulated, inputs, place), results)
    y, _, grad_x, grad_weight, x_sum, y_of_sum, grad_x_sum = results
    x, grad_y, residual, grad_sum, weight = inputs
    assert torch.equal(x_sum, x + residual)
    theirs = by_autograd(x, weight, grad_y)
    exact = by_autograd(exact_inputs[0], exact_inputs[4], exact_inputs[1])
    assert_exact(y, theirs[0], exact[0])
    assert_exact(grad_x, theirs[1], exact[1])
    assert_exact(grad_x_sum, theirs[1] + grad_sum, exact[1] + exact_inputs[3])
    assert_exact(
        y_of_sum,
        by_autograd(x_sum, weight, grad_y)[0],
        by_autograd(x_sum.double(), weight.double(), grad_y.double())[0],
    )
    assert_close(grad_weight, exact[2]) if len(x) else assert_same((grad_weight,), (torch.zeros(shape[1]),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 123), (19, 4096)], ids=str)
def test_rms_norm_is_that_of_the_cpu(
    emulated: Ops, native: Ops, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = [value.to(dtype) for value in norm_inputs(shape)]
    for ours, theirs in zip(
        norm(emulated, inputs, "contiguous"), norm(native, inputs, "contiguous"), strict=True
    ):
        assert_close(ours, theirs.double(), 2 * torch.finfo(ours.dtype).eps if ours.dtype in NARROW else 2e-6)


def test_rms_norm_of_many_rows_on_few_blocks(emulated: Ops) -> None:
    x, grad_y, _, _, weight = norm_inputs((301, 24))
    inverse_rms = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    arguments = grad_y.float(), x.float(), weight.float(), inverse_rms.float(), None
    assert_close(emulated.rms_norm_backward(*arguments)[1], by_autograd(x, weight, grad_y)[2])


# ---- AdamW ----

HYPER = (0.8, 0.95, 1e-6, 0.1)  # as those of tests.kernels.test_adamw


def adamw(
    ops: Ops,
    gradients: list[Tensor],
    start: Tensor,
    moments: torch.dtype,
    parameter: torch.dtype | None,
    place: str,
    offset: int = 0,
) -> list[Tensor]:
    """Master, moments and parameter after a step with each gradient."""
    state = [
        placed(start.float(), place),
        *(placed(torch.zeros(len(start), dtype=moments), place) for _ in range(2)),
    ]
    out = None if parameter is None else placed(torch.zeros(len(start), dtype=parameter), place)
    for step, gradient in enumerate(gradients, 1):
        ops.adamw_(*state, placed(gradient, place), out, *scalars(step), *HYPER, 7, offset)
    return state if out is None else [*state, out]


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("parameter", [None, *NARROW], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 13, 512, 25_003])
def test_adamw_is_that_of_torch(
    emulated: Ops, size: int, dtype: torch.dtype, parameter: torch.dtype | None, place: str
) -> None:
    start, gradients = randn(size, seed=1), [randn(size, seed=2 + i).to(dtype) for i in range(3)]
    arguments = gradients, start, torch.float32, parameter, place
    results = adamw(emulated, *arguments)
    assert_same(adamw(emulated, *arguments), results)
    assert_exact(results[0], by_torch(start.float(), gradients), by_torch(start, gradients))
    if parameter is not None:
        assert torch.equal(results[3], results[0].to(parameter))


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("parameter", [None, *NARROW], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_rounds_stochastically_as_the_cpu(
    emulated: Ops, native: Ops, dtype: torch.dtype, parameter: torch.dtype | None, place: str
) -> None:
    start, gradients = randn(5003, seed=1), [randn(5003, seed=2).to(dtype)]
    arguments = gradients, start, torch.bfloat16, parameter, place, 2**33 + 1
    ours, theirs = adamw(emulated, *arguments), adamw(native, *arguments)
    assert_close(ours[0], theirs[0].double(), 3e-7)
    # The last place of fp32 may fall either way; where it does, a draw in 65536 falls with it.
    assert sum(int((a != b).sum()) for a, b in zip(ours[1:3], theirs[1:3], strict=True)) <= 4


@pytest.mark.parametrize("scale", [torch.inf, torch.nan])
def test_adamw_changes_nothing_where_the_scale_is_not_finite(emulated: Ops, scale: float) -> None:
    state = [torch.full((9,), value) for value in (1.0, 2.0, 3.0)]
    parameter = torch.full((9,), 4.0).bfloat16()
    emulated.adamw_(*state, torch.ones(9), parameter, *scalars(1, scale=scale), *HYPER, 0, 0)
    assert [t.unique().tolist() for t in (*state, parameter)] == [[1.0], [2.0], [3.0], [4.0]]


# ---- the gradient's norm ----


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 5, 4096, 40_009, 300_001])
def test_squared_norm(emulated: Ops, native: Ops, size: int, dtype: torch.dtype, place: str) -> None:
    x = placed(randn(size, scale=1e-3).to(dtype), place)
    result = emulated.squared_norm(x)
    assert torch.equal(emulated.squared_norm(x), result)
    assert error(result, native.squared_norm(x)) <= 1e-12
    assert result.tolist() == [pytest.approx(float(x.double().square().sum()), rel=1e-12), 0.0]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_squared_norm_counts_what_is_not_finite(emulated: Ops, value: float) -> None:
    x = torch.ones(70_001)
    x[[0, 35_000, 70_000]] = value
    squares, not_finite = emulated.squared_norm(x).tolist()
    assert not_finite == 3
    assert squares != squares or squares == torch.inf
