"""The squared norm, in fp64, and the count of what is not finite."""

from __future__ import annotations

import pytest
import torch

from llm3d.kernels.gradient_norm import squared_norm
from tests.kernels.exactness import randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 5, 4096, 40_009, 300_001])
def test_it_is_that_of_fp64(size: int, dtype: torch.dtype) -> None:
    exact = randn(size + 1, scale=1e-3).to(dtype)[1:]
    squares, not_finite = squared_norm(exact).tolist()
    assert squares == pytest.approx(float(exact.double().square().sum()), rel=1e-7)
    assert not_finite == 0


def test_squares_beyond_fp32_are_no_overflow() -> None:
    assert squared_norm(torch.full((10,), 1e30)).tolist() == [pytest.approx(1e61), 0.0]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_counted(value: float) -> None:
    x = torch.ones(70_001)
    x[[0, 35_000, 70_000]] = value
    squares, not_finite = squared_norm(x).tolist()
    assert not_finite == 3
    assert squares != squares or squares == torch.inf
