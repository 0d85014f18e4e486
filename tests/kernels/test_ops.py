"""What holds for every operation: it repeats itself, threads and memory layout change nothing, it can be traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llm3d.bench.accuracy import check_kernels
from llm3d.bench.cases import Sizes, make_cases
from llm3d.kernels.accumulate import accumulate_
from llm3d.kernels.backend import using
from llm3d.kernels.cross_entropy import cross_entropy_backward_, softmax_stats
from llm3d.kernels.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from llm3d.kernels.rope import inverse_frequencies, rope, rope_tables
from llm3d.kernels.swiglu import swiglu, swiglu_backward_, swiglu_forward
from tests.kernels.exactness import randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Sizes(
    tokens=301, hidden=328, heads=4, intermediate=517, vocabulary=8003, parameters=100_003, context=77
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operation_is_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    assert [result for result in check_kernels(dtype, "cpu") if not result.holds] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_for_bit_on_any_number_of_threads(dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own sums depend on the threads")
    threads = torch.get_num_threads()
    for case in make_cases(SMALL, dtype, "cpu"):
        first, second = case.ours()(), case.ours()()
        try:
            torch.set_num_threads(4)
            third = case.ours()()
        finally:
            torch.set_num_threads(threads)
        for a, b, c in zip(first, second, third, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c), case.name


# ---- memory layout ----


def in_memory(x: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere: at an odd address, or as a part of wider rows."""
    if layout == "misaligned":
        place = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    else:
        place = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)[..., : x.shape[-1]]
    return place.copy_(x)


def on_matrices(dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """What each operation makes of matrices that are laid out by `place`."""
    x, residual, grad, grad_sum = (place(randn(9, 82, seed=i).to(dtype)) for i in range(4))
    weight = randn(82, seed=5).to(dtype)
    y, inverse_rms = rms_norm_forward(x, weight, 1e-5)
    yield y
    yield from rms_norm_backward(grad, x, weight, inverse_rms, grad_sum)
    yield from add_rms_norm_forward(x, residual, weight, 1e-5)
    yield x
    yield swiglu_forward(x)
    swiglu_backward_(place(randn(9, 41).to(dtype)), x)
    yield x
    targets = torch.arange(9)
    stats = softmax_stats(grad, targets)
    yield stats
    cross_entropy_backward_(grad, targets, stats[0], *stats[1:].mul(0.01))
    yield grad


@pytest.mark.parametrize("layout", ["misaligned", "wider rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_rows_lie_changes_nothing(dtype: torch.dtype, layout: str) -> None:
    expected = on_matrices(dtype, lambda x: x)
    actual = on_matrices(dtype, lambda x: in_memory(x, layout))
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_long_and_tensors_empty(dtype: torch.dtype) -> None:
    for shape in ((0, 8), (3, 0), (2, 40_002)):
        x, grad = randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype)
        weight = torch.ones(shape[1], dtype=dtype)
        y, inverse_rms = rms_norm_forward(x, weight, 1e-5)
        grad_x, grad_weight = rms_norm_backward(grad, x, weight, inverse_rms)
        assert y.shape == grad_x.shape == shape and grad_weight.shape == shape[1:]
        assert swiglu_forward(x).shape == (shape[0], shape[1] // 2)
        assert softmax_stats(x, torch.zeros(shape[0], dtype=torch.int64)).shape == (4, shape[0])
    assert torch.allclose(y.double().square().mean(1), torch.ones(2).double(), rtol=1e-2)


# ---- gradients ----


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


class AddRMSNorm(torch.autograd.Function):
    """On copies, for gradcheck goes backward again and again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x.clone()
        y, inverse_rms = add_rms_norm_forward(total, residual, weight, 1e-5)
        ctx.save_for_backward(total, weight, inverse_rms)
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, weight, inverse_rms = ctx.saved_tensors
        grad, grad_weight = rms_norm_backward(grads[1], total, weight, inverse_rms, grads[0])
        return grad, grad, grad_weight


def test_gradients_are_derivatives_in_fp64() -> None:
    positions = torch.tensor([0, 1, 0, 3, 2], dtype=torch.int32)
    tables = rope_tables(4, inverse_frequencies(6, 10000.0))
    assert torch.autograd.gradcheck(AddRMSNorm.apply, (leaf(3, 7), leaf(3, 7, seed=1), leaf(7, seed=2)))
    assert torch.autograd.gradcheck(lambda x: rope(x * 1, 6, *tables, positions, 3) * 1, (leaf(5, 24),))


def test_the_gradient_of_swiglu_is_its_derivative_in_fp64() -> None:
    """It goes backward once, so not by gradcheck."""
    x, grad, step = leaf(3, 10), randn(3, 5, seed=1), 1e-6
    (gradient,) = torch.autograd.grad(swiglu(x * 1), x, grad.clone())
    for i in range(x.numel()):
        shift = torch.zeros(30, dtype=torch.float64)
        shift[i] = step
        ahead, behind = (swiglu_forward(x.detach() + shift.view(3, 10) * sign) for sign in (1, -1))
        assert float(gradient.flatten()[i]) == pytest.approx(
            float(((ahead - behind) * grad).sum()) / (2 * step), abs=1e-8
        )


def test_a_gradient_of_a_gradient_is_an_error() -> None:
    x = leaf(3, 10)
    (gradient,) = torch.autograd.grad(swiglu(x * 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_second_backward_through_what_was_overwritten_is_an_error() -> None:
    out = swiglu(leaf(3, 10) * 1)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- tracing ----


def calls(dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments for each operation as PyTorch sees it."""
    x, y = randn(5, 8).to(dtype), randn(5, 8, seed=1).to(dtype)
    weight, per_row, targets = torch.ones(8, dtype=dtype), torch.rand(5), torch.arange(5)
    heads, positions = randn(5, 3, 4).to(dtype), torch.tensor([0, 1, 0, 1, 2], dtype=torch.int32)
    one = torch.ones((), dtype=torch.float64)
    state = [torch.rand(9) for _ in range(3)]
    return {
        "rms_norm_forward": (x, weight, 1e-5),
        "add_rms_norm_forward": (x.clone(), y, weight, 1e-5),
        "rms_norm_backward": (y, x, weight, per_row[:, None], y),
        "rope_": (heads, torch.rand(3, 2), torch.rand(3, 2), positions, False),
        "swiglu_forward": (x,),
        "swiglu_backward_": (x[:, :4].contiguous(), x.clone()),
        "softmax_stats": (x, targets),
        "cross_entropy_backward_": (x.clone(), targets, per_row, per_row, per_row, per_row),
        "adamw_": (
            *state,
            randn(9).to(dtype),
            torch.zeros(9, dtype=torch.bfloat16),
            torch.tensor(1),
            one,
            one,
            0.9,
            0.95,
            1e-8,
            0.1,
            0,
            0,
        ),
        "squared_norm": (x,),
        "accumulate_": (torch.zeros(5, 8), x),
    }


@pytest.mark.parametrize("op", calls(torch.float32))
def test_operations_can_be_traced(op: str, backend: str) -> None:
    """Schema, fake implementation and functionalisation agree with what the kernel does."""
    if backend == "reference":
        pytest.skip("PyTorch's own operations")
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(getattr(torch.ops.llm3d, op).default, calls(dtype)[op])


def test_compiled_code_calls_them() -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        return swiglu_forward(rms_norm_forward(x, weight, 1e-5)[0])

    x, weight = randn(4, 6).float(), torch.ones(6)
    assert torch.equal(torch.compile(block, backend="aot_eager", fullgraph=True)(x, weight), block(x, weight))


# ---- wrong calls ----


def test_a_wrong_call_is_an_error_that_says_what_is_wrong(backend: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch has its own words")
    x, weight = torch.zeros(3, 4), torch.zeros(4)
    targets = torch.zeros(3, dtype=torch.int64)
    table = torch.zeros(5, 1)
    for message, call in {
        "weight has 5 elements, not 4": lambda: rms_norm_forward(x, torch.zeros(5), 1e-5),
        "x has 3 dimensions, not 2": lambda: rms_norm_forward(torch.zeros(1, 2, 3), weight, 1e-5),
        "not side by side": lambda: swiglu_forward(torch.zeros(4, 6).t()),
        "an odd number": lambda: swiglu_forward(torch.zeros(3, 5)),
        "dtype .* is not supported": lambda: swiglu_forward(torch.zeros(3, 4, dtype=torch.int32)),
        "the tensors are not all on one device": lambda: rms_norm_forward(x, weight.to("meta"), 1e-5),
        "weight has dtype float32, not bfloat16": lambda: rms_norm_forward(x.bfloat16(), weight, 1e-5),
        "x has 3 in dimension 0, total 4": lambda: accumulate_(torch.zeros(4, 3), x.bfloat16()),
        "targets has 2 elements, not 3": lambda: softmax_stats(x, targets[:2]),
        "token 5 is at position 5, the tables have 5": lambda: rope(
            torch.zeros(6, 2), 2, table, table, torch.arange(6, dtype=torch.int32), 1
        ),
        "token 1 is at position -1": lambda: rope(
            torch.zeros(2, 2), 2, table, table, torch.tensor([0, -1], dtype=torch.int32), 1
        ),
        "positions has 5 elements, not 6": lambda: rope(
            torch.zeros(6, 2), 2, table, table, torch.arange(5, dtype=torch.int32), 1
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_reference_and_native_meet(backend: str) -> None:
    """The two faces of every operation agree to the rounding of fp32."""
    if backend == "reference":
        pytest.skip("compares both already")
    for case in make_cases(SMALL, torch.float32, "cpu"):
        native = case.ours()()
        with using("reference"):
            reference = case.ours()()
        for a, b in zip(native, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))
