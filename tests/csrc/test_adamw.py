"""What the CUDA kernel of AdamW computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.csrc.conftest import Ops
from tests.csrc.placing import DTYPES, PLACES, assert_same, placed
from tests.kernels.exactness import assert_close, assert_exact, randn
from tests.kernels.references import adamw_by_torch, adamw_scalars

NARROW = [torch.bfloat16, torch.float16]

HYPER = (0.8, 0.95, 1e-6, 0.1)  # as ADAMW of tests.kernels.references


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
        ops.adamw_(*state, placed(gradient, place), out, *adamw_scalars(step), *HYPER, 7, offset)
    return state if out is None else [*state, out]


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("parameter", [None, *NARROW], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 13, 512, 25_003])
def test_adamw_is_that_of_torch(
    cuda: Ops, size: int, dtype: torch.dtype, parameter: torch.dtype | None, place: str
) -> None:
    start, gradients = randn(size, seed=1), [randn(size, seed=2 + i).to(dtype) for i in range(3)]
    arguments = gradients, start, torch.float32, parameter, place
    results = adamw(cuda, *arguments)
    assert_same(adamw(cuda, *arguments), results)
    assert_exact(results[0], adamw_by_torch(start.float(), gradients), adamw_by_torch(start, gradients))
    if parameter is not None:
        assert torch.equal(results[3], results[0].to(parameter))


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("parameter", [None, *NARROW], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_rounds_stochastically_as_the_cpu(
    cuda: Ops, native: Ops, dtype: torch.dtype, parameter: torch.dtype | None, place: str
) -> None:
    start, gradients = randn(5003, seed=1), [randn(5003, seed=2).to(dtype)]
    arguments = gradients, start, torch.bfloat16, parameter, place, 2**33 + 1
    ours, theirs = adamw(cuda, *arguments), adamw(native, *arguments)
    assert_close(ours[0], theirs[0].double(), 3e-7)
    # The last place of fp32 may fall either way; where it does, a draw in 65536 falls with it.
    assert sum(int((a != b).sum()) for a, b in zip(ours[1:3], theirs[1:3], strict=True)) <= 4


@pytest.mark.parametrize("scale", [torch.inf, torch.nan])
def test_adamw_changes_nothing_where_the_scale_is_not_finite(cuda: Ops, scale: float) -> None:
    state = [torch.full((9,), value) for value in (1.0, 2.0, 3.0)]
    parameter = torch.full((9,), 4.0).bfloat16()
    cuda.adamw_(*state, torch.ones(9), parameter, *adamw_scalars(1, scale=scale), *HYPER, 0, 0)
    assert [t.unique().tolist() for t in (*state, parameter)] == [[1.0], [2.0], [3.0], [4.0]]
