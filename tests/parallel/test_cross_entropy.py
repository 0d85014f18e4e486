"""Cross-entropy over a vocabulary spread over ranks is that of PyTorch over the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llm3d.parallel.cross_entropy import cross_entropy_sum
from llm3d.parallel.layers import vocabulary_range
from llm3d.parallel.mesh import Mesh
from tests import pool
from tests.kernels.exactness import assert_as_exact_as, assert_close, error, randn

SCALE = 0.125  # what the loss's gradient is, as one over the number of targets would be


def on_rank(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss with and without a gradient wanted, and the gradient of this rank's part."""
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    part = vocabulary_range(logits.shape[1], group)
    mine = logits[:, part.start : part.stop].clone()
    alone = cross_entropy_sum(mine.clone(), targets, part.start, group)
    leaf = mine.requires_grad_()
    loss = cross_entropy_sum(leaf * 1, targets, part.start, group)
    loss.backward(torch.tensor(SCALE))
    assert leaf.grad is not None
    return loss.detach(), alone, leaf.grad


def ours(logits: Tensor, targets: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient, whole; every rank's loss is the same."""
    parts = pool.run(on_rank, num_ranks, logits, targets)
    for loss, alone, _ in parts:
        assert torch.equal(loss, parts[0][0]) and torch.equal(alone, loss)
        assert loss.dtype == torch.float32 and loss.shape == ()
    return parts[0][0], torch.cat([gradient for _, _, gradient in parts], dim=1)


def by_torch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, targets, ignore_index=-100, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss * SCALE, leaf)[0]


def some_targets(tokens: int, vocabulary: int) -> Tensor:
    """All over the vocabulary, the first and the last id among them; some ignored."""
    targets = torch.arange(tokens) * 31 % vocabulary
    targets[-1] = vocabulary - 1
    targets[1::4] = -100
    return targets


# On 4 ranks, 101 leaves the last 23 ids of 26, 5 leaves it none, and 2 leaves two ranks none.
@pytest.mark.parametrize("vocabulary", [101, 5, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_loss_and_gradient_do_not_depend_on_the_ranks(num_ranks: int, vocabulary: int) -> None:
    for tokens in (1, 37):
        exact, targets = randn(tokens, vocabulary, scale=3.0), some_targets(tokens, vocabulary)
        loss, gradient = ours(exact.float(), targets, num_ranks)
        expected_loss, expected_gradient = by_torch(exact, targets)
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
        assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_bf16_is_as_exact_as_torch(num_ranks: int) -> None:
    exact, targets = randn(37, 101, scale=3.0), some_targets(37, 101)
    loss, gradient = ours(exact.bfloat16(), targets, num_ranks)
    expected_loss, expected_gradient = by_torch(exact, targets)
    their_loss, their_gradient = by_torch(exact.bfloat16(), targets)
    assert_as_exact_as(their_gradient, gradient, expected_gradient)
    assert error(loss, expected_loss) <= 2 * error(their_loss, expected_loss)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_where_all_targets_are_ignored_there_is_no_loss(num_ranks: int) -> None:
    loss, gradient = ours(randn(6, 11).float(), torch.full((6,), -100), num_ranks)
    assert float(loss) == 0.0
    assert torch.equal(gradient, torch.zeros(6, 11))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_logits_may_be_as_large_as_the_dtype_allows(num_ranks: int) -> None:
    exact = torch.tensor(
        [[1e30, -1e30, 0.0, 1e30], [-3e4, -3e4, -3e4, -3e4], [5e4, 0.0, 0.0, 49990.0]]
    ).double()
    targets = torch.tensor([0, 3, 3])
    loss, gradient = ours(exact.float(), targets, num_ranks)
    expected_loss, expected_gradient = by_torch(exact.float().double(), targets)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradient, expected_gradient)
