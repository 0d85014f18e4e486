"""The passes of cross-entropy over one part of the vocabulary; put together in tests/parallel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels import cross_entropy
from llm3d.kernels.cross_entropy import cross_entropy_gradient_, softmax_stats
from tests.kernels.exactness import assert_close, randn

SHAPES = [(1, 1), (1, 13), (17, 5), (31, 97)]


def targets_of(tokens: int, vocabulary: int) -> Tensor:
    """Every third target is elsewhere."""
    targets = torch.arange(tokens) * 7 % vocabulary
    targets[2::3] = -1
    return targets


@pytest.mark.parametrize("chunk_elements", [1, 40, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_do_not_depend_on_the_chunks(
    shape: tuple[int, int], dtype: torch.dtype, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk_elements)
    exact, targets = randn(*shape, scale=5.0), targets_of(*shape)
    logits = exact.to(dtype)
    maximum, total, target = softmax_stats(logits, targets, keep_exponentials=False)
    assert torch.equal(logits, exact.to(dtype)), "the logits are kept"
    assert torch.equal(maximum.double(), exact.amax(1))
    assert_close(total, (exact - exact.amax(1, keepdim=True)).exp().sum(1))
    at_target = exact.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    assert torch.equal(target.double(), torch.where(targets >= 0, at_target, 0.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_that_of_the_weighted_loss(shape: tuple[int, int]) -> None:
    exact, targets = randn(*shape, scale=5.0).requires_grad_(), targets_of(*shape)
    weight = torch.arange(len(targets)) / 4
    losses = torch.nn.functional.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    counts = (targets >= 0).float()
    expected = torch.autograd.grad((losses * weight).sum(), exact)[0]
    logits = exact.detach().float()
    total = softmax_stats(logits, targets, keep_exponentials=True)[1]
    gradient = cross_entropy_gradient_(logits, targets, counts * weight / total, counts * weight)
    assert gradient is logits
    assert_close(gradient, expected)


def test_a_part_without_rows_adds_nothing() -> None:
    logits, targets = torch.empty(3, 0), torch.full((3,), -1)
    stats = softmax_stats(logits, targets, keep_exponentials=True)
    assert stats.tolist() == [[-torch.inf] * 3, [0.0] * 3, [0.0] * 3]
    assert cross_entropy_gradient_(logits, targets, torch.ones(3), torch.ones(3)).shape == (3, 0)


def test_the_bf16_gradient_keeps_its_digits_where_the_target_is_almost_sure() -> None:
    """p(target) is near 1, and the weight, one over the number of tokens, is no power of two."""
    tokens, vocabulary = 64, 4000
    targets = torch.arange(tokens) * 61 % vocabulary
    exact = randn(tokens, vocabulary)
    exact[torch.arange(tokens), targets] += 15.0
    logits = exact.bfloat16()
    weight = torch.full((tokens,), 1 / 5003)

    def torch_gradient(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        loss = torch.nn.functional.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), targets)
        return torch.autograd.grad(loss * tokens / 5003, x)[0]

    expected = torch_gradient(logits.double())
    torchs_error = (torch_gradient(logits.clone()).double() - expected).norm()
    total = softmax_stats(logits, targets, keep_exponentials=True)[1]
    gradient = cross_entropy_gradient_(logits, targets, weight / total, weight)
    assert (gradient.double() - expected).norm() <= 2 * torchs_error
