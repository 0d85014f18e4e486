"""Each operation against fp64, beside PyTorch's own error: what `llm3d kernels` prints."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llm3d.bench.cases import Results, Sizes, make_cases
from llm3d.kernels import backend

SIZES = Sizes(
    tokens=123, hidden=328, heads=4, intermediate=517, vocabulary=8003, parameters=100_003, context=77
)


class Exactness(NamedTuple):
    """Largest errors against fp64, relative to the largest value."""

    name: str
    backend: str
    ours: float
    torchs: float

    @property
    def holds(self) -> bool:
        """At most twice PyTorch's own error, or one rounding of fp32."""
        return self.ours <= max(2 * self.torchs, 2**-23)


def check_kernels(dtype: torch.dtype, device: torch.device | str) -> list[Exactness]:
    """Every operation in one dtype on a device."""
    results = []
    for case, exact_case in zip(
        make_cases(SIZES, dtype, device), make_cases(SIZES, torch.float64, device), strict=True
    ):
        assert case.theirs is not None and exact_case.theirs is not None, "PyTorch has them all"
        exact = exact_case.theirs()()
        errors = _error(case.ours()(), exact), _error(case.theirs()(), exact)
        results.append(Exactness(case.name, backend.of(case.op, device), *errors))
    return results


def _error(actual: Results, exact: Results) -> float:
    return max(
        float((a.double() - e.double()).abs().max() / e.abs().max().clamp(min=1e-30))
        for a, e in zip(actual, exact, strict=True)
    )


def print_kernels(device: torch.device | str, check: bool) -> bool:
    """List the operations, and with `check` their errors; -> whether all are as exact as they should be."""
    print(f"{device}: {backend.describe(device)}")
    if not check:
        for case in make_cases(SIZES, torch.float32, device):
            print(f"  {case.name:28} {case.op:26} {backend.of(case.op, device)}")
        return True
    print(f"  {'largest error against fp64':58} {'llm3d':>9} {'PyTorch':>9}")
    num_results, num_failures = 0, 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for result in check_kernels(dtype, device):
            verdict = "" if result.holds else "  MORE THAN TWICE PYTORCH'S"
            num_results, num_failures = num_results + 1, num_failures + (not result.holds)
            name = f"{result.name}, {str(dtype).removeprefix('torch.')}"
            print(f"  {name:38} {result.backend:19} {result.ours:9.1e} {result.torchs:9.1e}{verdict}")
    print(f"{num_results - num_failures} of {num_results} are within twice PyTorch's error")
    return num_failures == 0
