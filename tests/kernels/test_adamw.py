"""One pass of AdamW against torch's in fp64, and its stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels.adamw import adamw_
from tests.kernels.backends import needs_native
from tests.kernels.exactness import assert_exact, randn
from tests.kernels.references import ADAMW, adamw_by_torch, adamw_scalars

SIZES = [0, 1, 13, 512, 5003]


@pytest.mark.parametrize("offset", [0, 1, 3], ids="misaligned by {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_steps_are_those_of_torch(size: int, dtype: torch.dtype, offset: int) -> None:
    start = randn(size, seed=1)
    gradients = [randn(size, seed=2 + i).to(dtype) for i in range(3)]
    master, exp_avg, exp_avg_sq = (torch.zeros(size + offset)[offset:] for _ in range(3))
    master.copy_(start)
    parameter = torch.zeros(size + offset, dtype=torch.bfloat16)[offset:]
    for step, gradient in enumerate(gradients, 1):
        kept = gradient.clone()
        adamw_(master, exp_avg, exp_avg_sq, gradient, parameter, *adamw_scalars(step), **ADAMW)
        assert torch.equal(gradient, kept)
        assert torch.equal(parameter, master.bfloat16())
    exact, theirs = adamw_by_torch(start, gradients), adamw_by_torch(start.float(), gradients)
    if size:
        allowed = max(2 * float((theirs - exact).abs().max()), 2e-7 * float(exact.abs().max()))
        assert float((master - exact).abs().max()) <= allowed


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.99, 0.9999)], ids=str)
def test_moments_and_update_are_as_exact_for_betas_near_one(betas: tuple[float, float]) -> None:
    """From weights of 0, in which the whole update shows."""
    gradient, hyper = randn(4096), {**ADAMW, "betas": betas}
    state = [torch.zeros(4096) for _ in range(3)]
    adamw_(*state, gradient.float(), None, *adamw_scalars(1, lr=1.0, scale=1.0), **hyper)

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        leaf = torch.zeros(4096, dtype=dtype, requires_grad=True)
        optimizer = torch.optim.AdamW([leaf], lr=1.0, **hyper, fused=True)
        leaf.grad = gradient.to(dtype)
        optimizer.step()
        return [leaf.detach(), optimizer.state[leaf]["exp_avg"], optimizer.state[leaf]["exp_avg_sq"]]

    for ours, theirs, exact in zip(state, by_torch(torch.float32), by_torch(torch.float64), strict=True):
        assert_exact(ours, theirs, exact)


@pytest.mark.parametrize("scale", [torch.inf, torch.nan])
def test_nothing_changes_where_the_scale_is_not_finite(scale: float) -> None:
    tensors = [torch.full((9,), value) for value in (1.0, 2.0, 3.0)]
    parameter = torch.full((9,), 4.0).bfloat16()
    adamw_(*tensors, torch.ones(9), parameter, *adamw_scalars(1, scale=scale), **ADAMW)
    assert [float(t.float().mean()) for t in (*tensors, parameter)] == [1.0, 2.0, 3.0, 4.0]


def test_moments_in_bf16_are_rounded_up_and_down_with_the_right_mean() -> None:
    size = 200_000
    state = [torch.zeros(size) for _ in range(2)]
    rounded = [torch.zeros(size, dtype=torch.bfloat16) for _ in range(2)]
    gradient = torch.full((size,), 1.001)  # 0.2 and 0.05 of it and its square lie between numbers of bf16
    for moments in (state, rounded):
        adamw_(torch.ones(size), *moments, gradient, None, *adamw_scalars(1, scale=1.0), **ADAMW, seed=7)
    for exact, narrow in zip(state, rounded, strict=True):
        neighbors = narrow.unique()
        assert len(neighbors) == 2
        assert float(neighbors[0]) < float(exact[0]) < float(neighbors[1])
        gap = float(neighbors[1] - neighbors[0])
        assert float(narrow.double().mean()) == pytest.approx(float(exact[0]), abs=0.01 * gap)


def test_stochastic_rounding_is_a_function_of_seed_step_and_index() -> None:
    def moments(seed: int, step: int, part: slice = slice(None)) -> Tensor:
        size = len(range(1000)[part])
        state = [torch.zeros(size, dtype=torch.bfloat16) for _ in range(2)]
        gradient = torch.linspace(0.1, 1, 1000)[part].contiguous()
        offset = 10**10 + (part.start or 0)
        adamw_(
            torch.ones(size), *state, gradient, None, *adamw_scalars(step), **ADAMW, seed=seed, offset=offset
        )
        return torch.stack(state)

    whole = moments(1, 1)
    assert torch.equal(moments(1, 1), whole)
    assert torch.equal(moments(1, 1, slice(333, 700)), whole[:, 333:700])
    assert not torch.equal(moments(2, 1), whole)


@needs_native
def test_both_back_ends_draw_the_same_bits() -> None:
    from llm3d.kernels.backend import using

    def moments(backend: str) -> Tensor:
        state = [torch.zeros(1000, dtype=torch.bfloat16) for _ in range(2)]
        with using(backend):
            arguments = (
                torch.ones(1000),
                *state,
                torch.linspace(0.1, 1, 1000),
                None,
                *adamw_scalars(3, scale=1.0),
            )
            adamw_(*arguments, **ADAMW, seed=5, offset=2**33)
        return torch.stack(state)

    # The last place of fp32 may fall either way; where it does, a draw in 65536 falls with it.
    assert (moments("native") != moments("reference")).sum() <= 2
