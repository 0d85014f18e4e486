"""How exact a kernel is: held against fp64, with PyTorch's own error in the same precision as the yardstick."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """fp64, exactly representable in bf16, so that every precision starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().double()


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return float((actual.double() - exact).abs().max())


def assert_close(actual: Tensor, exact: Tensor, tolerance: float = 2e-6) -> None:
    """Largest error, relative to the largest value."""
    assert torch.isfinite(actual).all()
    assert error(actual, exact) <= tolerance * max(float(exact.abs().max()), 1e-30)


def assert_as_exact_as(theirs: Tensor, ours: Tensor, exact: Tensor) -> None:
    """At most twice PyTorch's error in the same precision; both results are of one dtype."""
    assert ours.dtype == theirs.dtype
    assert torch.isfinite(ours).all()
    assert error(ours, exact) <= 2 * error(theirs, exact)


def assert_exact(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """As assert_as_exact_as, or one rounding of the largest value: of few elements, PyTorch's error may be none."""
    assert ours.dtype == theirs.dtype and ours.shape == exact.shape
    assert torch.isfinite(ours).all()
    if exact.numel():
        rounding = torch.finfo(ours.dtype).eps * float(exact.abs().max())
        assert error(ours, exact) <= max(2 * error(theirs, exact), rounding)
