"""The arithmetic of PPO: worked by hand, and by its definitions on random replies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm3d.rl.advantages import (
    KLEstimator,
    adapted_coefficient,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    masked_mean,
    token_rewards,
    whiten,
)

KINDS: tuple[KLEstimator, ...] = ("k1", "abs", "k2", "k3")


def replies(seed: int) -> tuple[torch.Generator, Tensor]:
    """Of random lengths, one of one token and one of all."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 7, *torch.randint(1, 8, (3,), generator=generator).tolist()])
    return generator, torch.arange(7) < lengths[:, None]


def random(generator: torch.Generator, mask: Tensor) -> Tensor:
    """With what must not matter outside of the mask."""
    return torch.randn(mask.shape, generator=generator).masked_fill(~mask, torch.nan)


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_discounted_sums_of_surprises(seed: int, gamma: float, lam: float) -> None:
    """Each reply alone gives what it gives in the batch, and its advantages are what the definition says."""
    generator, mask = replies(seed)
    rewards, values = random(generator, mask), random(generator, mask)
    found = generalized_advantages(rewards, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        r, v = (
            rewards[row, :length].double(),
            torch.cat([values[row, :length].double(), torch.zeros(1).double()]),
        )
        surprises = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (i - t) * surprises[i] for i in range(t, length))
            assert found.advantages[row, t].item() == pytest.approx(float(expected), abs=1e-5)
            assert found.returns[row, t].item() == pytest.approx(float(expected + v[t]), abs=1e-5)
        assert not found.advantages[row, length:].any() and not found.returns[row, length:].any()


def test_with_nothing_discounted_the_return_is_the_reward_to_come() -> None:
    rewards = torch.tensor([[1.0, -2.0, 4.0]])
    found = generalized_advantages(
        rewards, torch.tensor([[0.5, 0.0, 9.0]]), torch.ones(1, 3).bool(), 1.0, 1.0
    )
    assert found.returns.tolist() == [[3.0, 2.0, 4.0]] and found.advantages.tolist() == [[2.5, 2.0, -5.0]]


def test_one_step_ahead_the_advantage_is_the_surprise() -> None:
    rewards, values = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[0.5, 1.0, 9.0]])
    found = generalized_advantages(rewards, values, torch.ones(1, 3).bool(), 0.5, 0.0)
    assert found.advantages.tolist() == [[1.0, 1.5, -5.0]]


def test_the_score_stands_on_the_last_token() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kl = torch.tensor([[0.5, 1.0, torch.nan], [2.0, torch.nan, torch.nan]])
    rewards = token_rewards(torch.tensor([3.0, -1.0]), kl, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 2.9, 0.0], [-1.2, 0.0, 0.0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_of_kl_are_right_on_average(kind: KLEstimator) -> None:
    """Over a distribution's own tokens: k1 and k3 exactly, k2 nearly where the two are near; all 0 where they agree."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator).double()
    log_p = logits.log_softmax(0)
    log_reference = (logits + 0.05 * torch.randn(9, generator=generator)).log_softmax(0)
    kl = (log_p.exp() * (log_p - log_reference)).sum()
    average = (log_p.exp() * kl_estimate(log_p, log_reference, kind)).sum()
    tolerance = {"k1": 1e-9, "k3": 1e-9, "k2": 0.05}.get(kind)
    if tolerance is not None:
        assert average.item() == pytest.approx(kl.item(), rel=tolerance)
    assert not kl_estimate(log_p, log_p, kind).any()
    torch.testing.assert_close(
        kl_estimate(log_p, log_reference, "abs"), kl_estimate(log_p, log_reference, "k1").abs()
    )
    if kind != "k1":
        assert (kl_estimate(log_p, log_reference, kind) >= 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_leaves_a_variance_of_one(shift_mean: bool) -> None:
    generator, mask = replies(3)
    x = 5 + 3 * random(generator, mask)
    white = whiten(x, mask, shift_mean)
    inside = white[mask]
    assert inside.var().item() == pytest.approx(1, rel=1e-5)
    assert inside.mean().item() == pytest.approx(0 if shift_mean else x[mask].mean().item(), abs=1e-5)
    assert not white[~mask].any()
    assert torch.equal(inside.argsort(), x[mask].argsort()), "the order stays"
    assert masked_mean(x, mask).item() == pytest.approx(x[mask].mean().item())


def test_one_token_is_whitened_without_a_division_by_zero() -> None:
    assert whiten(torch.tensor([[4.0]]), torch.tensor([[True]])).tolist() == [[0.0]]


def test_group_advantages_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    above = group_advantages(scores, 3, "rloo")
    assert above.tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])
    deviation = math.sqrt(7)
    expected = [x / (deviation + 1e-4) for x in (-2, -1, 3)]
    assert group_advantages(scores, 3, "grpo").tolist() == pytest.approx([*expected, 0, 0, 0])


@given(st.integers(0, 99), st.sampled_from(["grpo", "rloo"]))
def test_a_group_is_judged_by_itself(seed: int, kind: str) -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    together = group_advantages(scores, 4, kind)
    apart = torch.cat([group_advantages(part, 4, kind) for part in scores.split(4)])
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(together.view(3, 4).sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    shifted = group_advantages(scores + torch.tensor([1.0, 5.0, -2.0]).repeat_interleave(4), 4, kind)
    torch.testing.assert_close(shifted, together, atol=1e-4, rtol=1e-4)


def test_the_coefficient_follows_the_kl() -> None:
    assert adapted_coefficient(0.2, kl=6.0, target=6.0, horizon=10000, num_replies=256) == 0.2
    assert adapted_coefficient(0.2, 6.6, 6.0, 10000, 256) == pytest.approx(0.2 * (1 + 0.1 * 0.0256))
    assert adapted_coefficient(0.2, 60.0, 6.0, 10000, 256) == pytest.approx(0.2 * (1 + 0.2 * 0.0256)), (
        "at most so fast"
    )
    assert adapted_coefficient(0.2, 0.0, 6.0, 10000, 256) == pytest.approx(0.2 * (1 - 0.2 * 0.0256))
