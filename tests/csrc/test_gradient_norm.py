"""What the CUDA kernels of the gradient's norm compute."""

from __future__ import annotations

import pytest
import torch

from tests.csrc.conftest import Ops
from tests.csrc.placing import DTYPES, PLACES, placed
from tests.kernels.exactness import error, randn


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 5, 4096, 40_009, 300_001])
def test_squared_norm(cuda: Ops, native: Ops, size: int, dtype: torch.dtype, place: str) -> None:
    x = placed(randn(size, scale=1e-3).to(dtype), place)
    result = cuda.squared_norm(x)
    assert torch.equal(cuda.squared_norm(x), result)
    assert error(result, native.squared_norm(x)) <= 1e-12
    assert result.tolist() == [pytest.approx(float(x.double().square().sum()), rel=1e-12), 0.0]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_squared_norm_counts_what_is_not_finite(cuda: Ops, value: float) -> None:
    x = torch.ones(70_001)
    x[[0, 35_000, 70_000]] = value
    squares, not_finite = cuda.squared_norm(x).tolist()
    assert not_finite == 3
    assert squares != squares or squares == torch.inf
