"""Causal attention over packed sequences against fp64 softmax under an explicit mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels.attention import attention
from tests.kernels.exactness import assert_as_exact_as, assert_close, randn

LENGTHS = [
    [1],
    [7],
    [1, 1, 1],
    [5, 5, 5],
    [13, 1, 2, 31, 1],
    list(range(1, 18)),
]
HEADS = [(1, 1), (3, 3), (6, 2), (5, 1)]  # of queries, of keys and values


def tensors(lengths: list[int], heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    counts = (heads, kv_heads, kv_heads, heads)
    return [randn(sum(lengths), count, 8, seed=i) for i, count in enumerate(counts)]


def ours(lengths: list[int], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, then the gradients of q, k and v."""
    bounds = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, bounds, max(lengths))
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def by_autograd(lengths: list[int], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = inputs
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    at = torch.arange(len(q), device=q.device)
    visible = (sequence[:, None] == sequence) & (at[:, None] >= at)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_fp32_is_the_definition(lengths: list[int], heads: int, kv_heads: int) -> None:
    inputs = tensors(lengths, heads, kv_heads)
    actual = ours(lengths, *(x.float() for x in inputs))
    largest = max(float(x.abs().max()) for x in inputs)
    for ours_, exact in zip(actual, by_autograd(lengths, *inputs), strict=True):
        assert float((ours_ - exact).abs().max()) <= 1e-5 * largest


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS[2:])
@pytest.mark.parametrize("lengths", LENGTHS[3:], ids=str)
def test_bf16_is_as_exact_as_torch(lengths: list[int], heads: int, kv_heads: int) -> None:
    inputs = tensors(lengths, heads, kv_heads)
    narrow = [x.bfloat16() for x in inputs]
    results = zip(
        ours(lengths, *narrow), by_autograd(lengths, *narrow), by_autograd(lengths, *inputs), strict=True
    )
    for actual, theirs, exact in results:
        assert_as_exact_as(theirs, actual, exact)


def test_scores_of_any_size_stay_finite() -> None:
    lengths = [3, 11]
    inputs = tensors(lengths, 4, 2)
    inputs[0] *= 1e3
    for actual, exact in zip(
        ours(lengths, *(x.float() for x in inputs)), by_autograd(lengths, *inputs), strict=True
    ):
        assert_close(actual, exact, tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [13, 1, 2, 31, 1]], ids=str)
def test_bf16_on_a_gpu_is_as_exact_as_torch(lengths: list[int]) -> None:
    inputs = [torch.cat([x, x, x, x], dim=-1).cuda() for x in tensors(lengths, 6, 2)]
    narrow = [x.bfloat16() for x in inputs]
    results = zip(
        ours(lengths, *narrow), by_autograd(lengths, *narrow), by_autograd(lengths, *inputs), strict=True
    )
    for actual, theirs, exact in results:
        assert_as_exact_as(theirs, actual, exact)
