"""The losses and the arithmetic around them: what TRL 0.9.4 made of the same replies, verl's formulas, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm3d.config import PPOSettings
from llm3d.rl.advantages import (
    RunningMoments,
    adapted_coefficient,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    masked_mean,
    token_rewards,
    whiten,
)
from llm3d.rl.losses import policy_loss, value_loss

TRL = json.loads((Path(__file__).parent / "trl-0.9.4.json").read_text())["cases"]


def settings(**given: Any) -> PPOSettings:
    return PPOSettings.model_validate({"rewards": [{"model": "unused"}], **given})


@pytest.mark.parametrize("case", TRL, ids=range(len(TRL)))
def test_the_arithmetic_is_that_of_trl(case: dict[str, Any]) -> None:
    """Rewards, advantages, losses, what is clipped, and the adaptive coefficient."""
    asked, known, expected = settings(**case["settings"]), case["given"], case["found"]
    mask = torch.tensor(known["mask"])
    x = {
        name: torch.tensor(known[name])
        for name in ("scores", "reference", "old", "new", "values", "new_values")
    }
    kl = kl_estimate(x["old"], x["reference"], asked.kl_estimator)
    rewards = token_rewards(x["scores"], kl, mask, asked.kl_coefficient)
    found = generalized_advantages(rewards, x["values"], mask, asked.gamma, asked.lam)
    advantages = whiten(found.advantages, mask)
    for name, table in (("rewards", rewards), ("advantages", advantages), ("returns", found.returns)):
        torch.testing.assert_close(table, torch.tensor(expected[name]), rtol=1e-5, atol=1e-6)
    policy = policy_loss(x["new"], x["old"], advantages, asked)
    value = value_loss(x["new_values"], x["values"], found.returns, asked.value_clip)
    numbers = {
        "policy_loss": masked_mean(policy.loss, mask),
        "policy_clipfrac": masked_mean(policy.clipped.float(), mask),
        "value_loss": masked_mean(value.loss, mask),
        "value_clipfrac": masked_mean(value.clipped.float(), mask),
        "approxkl": masked_mean(0.5 * (x["new"] - x["old"]).square(), mask),
    }
    for name, number in numbers.items():
        assert number.item() == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    coefficient = adapted_coefficient(
        asked.kl_coefficient, known["kl"], known["target"], known["horizon"], len(mask)
    )
    assert coefficient == pytest.approx(expected["coefficient"])


def random(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities before and after, advantages."""
    generator = torch.Generator().manual_seed(seed)
    old, change, advantages = (torch.randn(40, generator=generator) for _ in range(3))
    return old - 3, old - 3 + 0.6 * change, advantages


@pytest.mark.parametrize("seed", range(4))
def test_the_policy_loss_is_that_of_verl(seed: int) -> None:
    """Clip-higher (DAPO) and the lower bound of dual-clip PPO, as its documentation writes them."""
    old, new, advantages = random(seed)
    found = policy_loss(new, old, advantages, settings(clip=0.2, clip_high=0.28, dual_clip=3.0))
    for i in range(len(old)):
        ratio, advantage = (new[i] - old[i]).exp().item(), advantages[i].item()
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
        expected = max(surrogate, 3.0 * advantage) if advantage < 0 else surrogate
        assert found.loss[i].item() == pytest.approx(-expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_where_it_is_clipped_the_policy_has_no_gradient(seed: int) -> None:
    old, new, advantages = random(seed)
    new.requires_grad_()
    loss, clipped = policy_loss(new, old, advantages, settings(dual_clip=2.0))
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert clipped.any() and not clipped.all()
    assert torch.equal(gradient == 0, clipped)


def test_the_gain_is_cut_off_and_the_loss_is_not() -> None:
    """Ratios of 2 and 1/2 at a clip of 0.2: what moves in the right direction too far gains no more."""
    ratio, advantages = torch.tensor([2.0, 0.5, 2.0, 0.5]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    found = policy_loss(ratio.log(), torch.zeros(4), advantages, settings())
    torch.testing.assert_close(found.loss, torch.tensor([-1.2, 0.8, 2.0, -0.5]))
    assert found.clipped.tolist() == [True, True, False, False]


def test_a_value_that_runs_ahead_is_held_to_its_bound() -> None:
    """From 0 towards 3: at 1, the error counts as if it were at 0.2; away from it, at -1, as it is."""
    found = value_loss(torch.tensor([1.0, -1.0]), torch.zeros(2), torch.full((2,), 3.0), 0.2)
    torch.testing.assert_close(found.loss, torch.tensor([0.5 * 2.8**2, 0.5 * 16]))
    assert found.clipped.tolist() == [True, False]
    torch.testing.assert_close(
        value_loss(*found[:1] * 2, torch.ones(2), None).loss, 0.5 * (found.loss - 1).square()
    )


def test_groups_are_compared_within_themselves() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    rloo = group_advantages(scores, 3, "rloo")
    torch.testing.assert_close(rloo, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0]))
    grpo, deviation = group_advantages(scores, 3, "grpo"), torch.tensor([1.0, 2.0, 6.0]).std()
    torch.testing.assert_close(grpo[:3], torch.tensor([-2.0, -1.0, 3.0]) / (deviation + 1e-4))
    assert not grpo[3:].any()


def test_the_spread_of_scores_is_that_of_all_of_them() -> None:
    spread, values = RunningMoments(), [3.0, -1.0, 4.0, 1.5, 9.0]
    for part in (values[:2], values[2:]):
        spread.add(part)
    assert spread.mean == pytest.approx(sum(values) / 5)
    assert spread.deviation == pytest.approx(torch.tensor(values).std().item())


def test_a_value_within_its_limits_is_not_clipped() -> None:
    """However its difference from what it was is rounded."""
    generator = torch.Generator().manual_seed(0)
    old, returns = (torch.randn(1000, generator=generator) for _ in range(2))
    values = old + 0.19 * (2 * torch.rand(1000, generator=generator) - 1)
    assert not value_loss(values, old, returns, 0.2).clipped.any()
