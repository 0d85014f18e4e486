"""From rewards and values to advantages: the arithmetic of PPO, GRPO and RLOO on plain tensors.

A batch of replies is [replies, tokens], fp32, padded on the right; mask, bool, says which tokens are of a reply. What
stands outside of it does not matter and comes out as 0. Presets of the settings name their source: Stiennon et al.
2020 and Ouyang et al. 2022 as TRL's first PPOTrainer has them, and Huang et al. 2024, "The N+ implementation details
of RLHF with PPO".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "abs", "k2", "k3"]


def kl_estimate(log_p: Tensor, log_reference: Tensor, kind: KLEstimator) -> Tensor:
    """Of each token, an estimate of KL(p || reference) from the token that p has drawn. Schulman 2020.

    k1: log p - log reference, unbiased.  abs: its magnitude.  k2: half its square.
    k3: r - 1 - log r with r = reference / p, unbiased and never negative.
    """
    difference = log_p - log_reference
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return 0.5 * difference.square()
    return torch.expm1(-difference) + difference


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """-coefficient kl of each token, and on the last one the reply's score. Ziegler et al. 2019.

    scores: [replies].  kl: [replies, tokens].
    """
    rewards = (-coefficient * kl).masked_fill(~mask, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


class Advantages(NamedTuple):
    advantages: Tensor  # [replies, tokens]
    returns: Tensor  # [replies, tokens], what values should have been


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Advantages:
    """Generalized advantage estimation, Schulman et al. 2016: each reply by itself, nothing after its last token.

    A(t) = d(t) + gamma lam A(t + 1), d(t) = r(t) + gamma V(t + 1) - V(t); the returns are A + V.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    following = torch.zeros_like(values[:, 0])
    advantage = following
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
        following = values[:, t]
    advantages = advantages.masked_fill(~mask, 0.0)
    return Advantages(advantages, advantages + values)


def group_advantages(scores: Tensor, group_size: int, kind: Literal["grpo", "rloo"]) -> Tensor:
    """Of each reply, by how much its score is above those to the same prompt.

    scores: [prompts * group_size], the replies to a prompt next to each other -> the same shape.
    grpo: in standard deviations of the group, Shao et al. 2024 (DeepSeekMath), section 4.1; 1e-4 is added to them.
    rloo: above the mean of the others, Ahmadian et al. 2024.
    """
    groups = scores.view(-1, group_size)
    above = groups - groups.mean(1, keepdim=True)
    if kind == "rloo":
        return (above * (group_size / (group_size - 1))).view(-1)
    return (above / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over all tokens of all replies."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """To a variance of 1 over all tokens of all replies, and a mean of 0, or the one it had.

    The variance is that of a sample, over n - 1; 1e-8 is added to it.
    """
    mean, count = masked_mean(x, mask), mask.sum()
    variance = masked_mean((x - mean).square(), mask) * count / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean).masked_fill(~mask, 0.0)


def adapted_coefficient(
    coefficient: float, kl: float, target: float, horizon: float, num_replies: int
) -> float:
    """What the KL penalty is multiplied by next, so that a reply's KL comes to the target. Ziegler et al. 2019, 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_replies / horizon)


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far. Welford 1962."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Iterable[float]) -> None:
        for value in values:
            self.count += 1
            before = value - self.mean
            self.mean += before / self.count
            self.squares += before * (value - self.mean)

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / max(1, self.count - 1))
