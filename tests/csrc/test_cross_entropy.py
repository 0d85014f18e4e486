"""What the CUDA kernels of the cross-entropy compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.csrc.conftest import Ops
from tests.csrc.placing import DTYPES, PLACES, assert_same, placed
from tests.kernels.exactness import assert_close, assert_exact, randn
from tests.kernels.references import targets_of

SHAPES = [(0, 8), (1, 1), (9, 13), (7, 264), (3, 8003), (2, 17_000), (2, 40_000)]


def factors_of(logits: Tensor) -> tuple[Tensor, ...]:
    """maximum, scale, at_target and shift, of which the last three are 0 for every fourth token."""
    maximum, scale, at_target, shift = randn(4, len(logits), seed=1)
    counts = torch.arange(len(logits)) % 4 != 3
    return maximum.abs() + logits.amax(1), scale * counts, at_target * counts, shift * counts / 100


def gradient_of(logits: Tensor, targets: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """By PyTorch, in the dtype of the factors."""
    maximum, scale, at_target, shift = (factor[:, None] for factor in factors)
    columns = torch.arange(logits.shape[1])
    extra = torch.where(columns == targets[:, None], at_target, 0.0)
    return (scale * (logits.to(maximum.dtype) - maximum).exp() + shift + extra).to(logits.dtype)


def gradient(ops: Ops, logits: Tensor, targets: Tensor, factors: tuple[Tensor, ...], place: str) -> Tensor:
    logits = placed(logits, place)
    ops.cross_entropy_backward_(logits, targets, *(factor.float() for factor in factors))
    return logits.clone()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_stats(cuda: Ops, shape: tuple[int, int], dtype: torch.dtype, place: str) -> None:
    exact, targets = randn(*shape, scale=5.0), targets_of(*shape)
    logits = placed(exact.to(dtype), place)
    stats = cuda.softmax_stats(logits, targets)
    assert torch.equal(cuda.softmax_stats(logits, targets), stats)
    assert stats.dtype == torch.float32 and stats.shape == (4, shape[0])
    if not shape[0]:
        return
    maximum, total, target, everything = stats
    assert torch.equal(maximum.double(), exact.amax(1))
    assert_close(total, (exact - exact.amax(1, keepdim=True)).exp().sum(1))
    here = (targets >= 0) & (targets < shape[1])
    assert torch.equal(
        target.double(), torch.where(here, exact.gather(1, targets.where(here, 0)[:, None])[:, 0], 0)
    )
    assert (everything - exact.sum(1)).abs().max() <= 2e-6 * exact.abs().sum(1).max()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_backward(cuda: Ops, shape: tuple[int, int], dtype: torch.dtype, place: str) -> None:
    exact, targets = randn(*shape, scale=3.0), targets_of(*shape)
    factors, logits = tuple(factor.float().double() for factor in factors_of(exact)), exact.to(dtype)
    ours = gradient(cuda, logits, targets, factors, place)
    assert torch.equal(gradient(cuda, logits, targets, factors, place), ours)
    theirs = gradient_of(logits, targets, tuple(factor.float() for factor in factors))
    assert_exact(ours, theirs, gradient_of(exact, targets, factors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_passes_are_those_of_the_cpu(cuda: Ops, native: Ops, dtype: torch.dtype) -> None:
    exact, targets = randn(9, 1003, scale=3.0), targets_of(9, 1003)
    logits, factors = exact.to(dtype), factors_of(exact)
    ours, cpu = (ops.softmax_stats(logits, targets) for ops in (cuda, native))
    assert_same((ours[0], ours[2]), (cpu[0], cpu[2]))
    assert_close(ours[1], cpu[1].double())
    assert_close(ours[3], cpu[3].double(), 1e-5)
    theirs = gradient(native, logits, targets, factors, "contiguous")
    rounding = max(2e-6, torch.finfo(dtype).eps)
    assert_close(gradient(cuda, logits, targets, factors, "contiguous"), theirs.double(), rounding)


@pytest.mark.parametrize("columns", [13, 264, 5000])
def test_numbers_that_are_none_end_as_on_the_cpu(cuda: Ops, native: Ops, columns: int) -> None:
    """One NaN, all NaN, one -inf, all -inf, one inf, and inf beside NaN."""
    logits = randn(6, columns).float()
    logits[0, columns // 2] = logits[5, 1] = torch.nan
    logits[1], logits[3] = torch.nan, -torch.inf
    logits[2, 3], logits[4, columns - 1], logits[5, 5] = -torch.inf, torch.inf, torch.inf
    targets = torch.tensor([0, 1, 3, 4, columns - 1, 1])
    ours, cpu = (ops.softmax_stats(logits, targets) for ops in (cuda, native))
    assert torch.allclose(ours, cpu, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ours[1].isnan().tolist() == [True, True, False, False, True, True]
    assert ours[0, 3] == -torch.inf and ours[1, 3] == 0


def test_no_columns(cuda: Ops) -> None:
    logits, targets = torch.empty(3, 0), torch.tensor([0, -1, 5])
    stats = cuda.softmax_stats(logits, targets)
    assert stats.tolist() == [[-torch.inf] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]
    cuda.cross_entropy_backward_(logits, targets, *torch.ones(4, 3))


def test_an_ignored_token_has_no_gradient_whatever_its_logits_are(cuda: Ops) -> None:
    logits = torch.full((2, 300), torch.nan)
    cuda.cross_entropy_backward_(
        logits, torch.tensor([5, -1]), torch.full((2,), torch.nan), *torch.zeros(3, 2)
    )
    assert torch.equal(logits, torch.zeros(2, 300))
