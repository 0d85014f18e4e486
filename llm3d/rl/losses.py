"""What policy and critic are trained on: the clipped losses of PPO over replies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm3d.config import PPOSettings
from llm3d.models.heads import HeadName
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.rl.advantages import kl_estimate
from llm3d.rl.rollout import RolloutBatch


class Losses(NamedTuple):
    """loss: fp32 [tokens].  clipped: bool [tokens], where its gradient is cut off."""

    loss: Tensor
    clipped: Tensor


def policy_loss(log_p: Tensor, old_log_p: Tensor, advantages: Tensor, settings: PPOSettings) -> Losses:
    """-min(r A, clip(r, 1 - clip, 1 + clip_high) A), r = p / old p; all fp32 [tokens]. Schulman et al. 2017, eq. 7.

    With dual_clip c, where A < 0 the loss is at most -c A: Ye et al. 2020, equation 5.
    """
    ratio = (log_p - old_log_p).exp()
    high = settings.clip if settings.clip_high is None else settings.clip_high
    kept = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - settings.clip, 1 + high)
    loss, clipped = torch.maximum(kept, bounded), bounded > kept
    if settings.dual_clip is not None:
        most = torch.where(advantages < 0, -settings.dual_clip * advantages, torch.inf)
        loss, clipped = torch.minimum(loss, most), clipped | (loss > most)
    return Losses(loss, clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Losses:
    """Half the squared error, or that of the value kept within clip of what it was, where that is larger.

    All fp32 [tokens]. As in the code of Schulman et al. 2017 (OpenAI Baselines) and in TRL.
    """
    error = (values - returns).square()
    if clip is None:
        return Losses(0.5 * error, torch.zeros_like(error, dtype=torch.bool))
    # By its bounds, so that a value within them stays what it is to the last digit, and does not count as clipped.
    bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return Losses(0.5 * torch.maximum(error, bounded), bounded > error)


@dataclass(frozen=True)
class PolicyObjective:
    """`policy_loss` over replies; names as TRL reports them."""

    settings: PPOSettings
    head: HeadName = "language"
    unit: str = "token"
    sums: tuple[str, ...] = (
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "val/ratio",
        "loss/kl_avg",
        "policy/entropy_avg",
        "loss/ptx_avg",
    )
    maxima: tuple[str, ...] = ()

    def count(self, batch: Any) -> int:
        return batch.num_terms

    def __call__(self, output: TokenTerms, batch: RolloutBatch) -> Tensor:
        settings, log_p, weights = self.settings, output.log_probabilities, batch.weights
        old = batch.old_log_probabilities
        loss, clipped = policy_loss(log_p, old, batch.advantages, settings)
        kl, entropy = torch.zeros_like(loss), torch.zeros_like(loss)
        if settings.kl_in_loss:
            kl = kl_estimate(log_p, batch.reference_log_probabilities, settings.kl_estimator)
        if settings.entropy_coefficient:
            assert output.entropy is not None, "the language head gives it"
            entropy = output.entropy()
        ptx = -log_p * batch.ptx_weights
        loss = loss + settings.kl_coefficient * kl - settings.entropy_coefficient * entropy
        difference = (log_p - old).detach()
        reported = [0.5 * difference.square(), clipped.float(), difference.exp(), kl, entropy]
        sums = (weights * torch.stack(reported)).sum(1).detach()
        return torch.cat([((weights * loss).sum() + ptx.sum())[None], sums, ptx.sum().detach()[None]])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The policy's own loss is what is left of the loss without the terms that may be added to it."""
        settings, means = self.settings, dict(means)
        added = {
            "loss/kl_avg": settings.kl_coefficient * settings.kl_in_loss,
            "policy/entropy_avg": -settings.entropy_coefficient,
            "loss/ptx_avg": settings.ptx_coefficient,
        }
        if settings.ptx_coefficient:
            means["loss/ptx_avg"] /= settings.ptx_coefficient
        means["loss/policy_avg"] = means["loss"] - sum(by * means[name] for name, by in added.items())
        return {name: value for name, value in means.items() if added.get(name, 1.0)}


@dataclass(frozen=True)
class ValueObjective:
    """`value_loss` over replies."""

    settings: PPOSettings
    head: HeadName = "score"
    unit: str = "token"
    sums: tuple[str, ...] = ("val/clipfrac_avg",)
    maxima: tuple[str, ...] = ()

    def count(self, batch: Any) -> int:
        return batch.num_terms

    def __call__(self, output: Tensor, batch: RolloutBatch) -> Tensor:
        loss, clipped = value_loss(output, batch.old_values, batch.returns, self.settings.value_clip)
        return torch.stack([(batch.weights * loss).sum(), (batch.weights * clipped).sum()])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means
