"""Kahneman-Tversky optimization: learns from single replies that are labeled desirable or not.

Ethayarajh et al. 2024. With r(y) = log p(y) - log p_reference(y) and z = max(0, KL(p, p_reference)), a desirable reply
costs w (1 - sigmoid(beta (r - z))), an undesirable one w (1 - sigmoid(beta (z - r))). The KL is estimated over the
step: the mean of r over its prompts, each with the reply of another sample, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llm3d.config import KTOConfig, KTOSettings
from llm3d.data.conversations import open_chat
from llm3d.data.packed import PackedBatch
from llm3d.models.heads import HeadName
from llm3d.parallel.collectives import all_reduce_sum
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.stages.reference import LiveReference, sequence_log_probabilities, with_reference_model
from llm3d.stages.stage import ModelTask, Stage
from llm3d.train.objective import of_padding
from llm3d.train.trainer import ShardedModel


@dataclass(frozen=True)
class KTOObjective:
    """The loss of labeled replies, and what TRL's users watch, under the names that they know."""

    settings: KTOSettings
    head: HeadName = "language"
    unit: str = "sample"
    sums: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "kl",
        "chosen",
        "rejected",
    )
    maxima: tuple[str, ...] = ()

    def count(self, batch: Any) -> int:
        return batch.num_samples

    def __call__(self, output: TokenTerms, batch: PackedBatch) -> Tensor:
        settings = self.settings
        if not batch.num_sequences:
            return of_padding(output.log_probabilities, self)
        log_p, desirable = batch.sum_by_sequence(output.log_probabilities), batch.ranks == 0
        ratio = log_p - (0.0 if batch.reference is None else batch.reference)
        kl = torch.zeros_like(ratio[0]) if batch.kl is None else batch.kl
        sign = torch.where(desirable, settings.beta, -settings.beta)
        weight = torch.where(desirable, settings.desirable_weight, settings.undesirable_weight)
        loss = (weight * (1 - torch.sigmoid(sign * (ratio - kl)))).sum()
        chosen, rejected = desirable.float(), (~desirable).float()
        reported = [
            settings.beta * ratio * chosen,
            settings.beta * ratio * rejected,
            log_p * chosen,
            log_p * rejected,
            kl.expand_as(ratio),
            chosen,
            rejected,
        ]
        return torch.cat([loss[None], torch.stack(reported).sum(1).detach()])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Rewards and log-probabilities are means over the replies of a label, where there are any."""
        named = {"loss": means["loss"], "kl": means["kl"]}
        for label in ("chosen", "rejected"):
            share = means[label]
            if share:
                named |= {
                    f"{name}/{label}": means[f"{name}/{label}"] / share for name in ("rewards", "logps")
                }
        return named


class KTOReference:
    """A `LiveReference` that completes microbatches with the step's KL divergence as well."""

    def __init__(self, model: ShardedModel) -> None:
        self.model, self.live = model, LiveReference(model)

    def prepare(self) -> None:
        self.live.prepare()

    def complete(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        others = [batch.mismatched for batch in microbatches if batch.mismatched is not None]
        policy = self.model.outputs(others, sequence_log_probabilities)
        kl = self._kl(policy, self.live.log_probabilities(others), microbatches[0].step_samples)
        return [replace(batch, kl=kl) for batch in self.live.complete(microbatches)]

    def _kl(self, policy: list[Tensor] | None, reference: list[Tensor] | None, num_samples: int) -> Tensor:
        """Estimated over all samples of the step, not below 0; on every rank: fp32 scalar."""
        mesh = self.model.mesh
        total = torch.zeros((), device=mesh.device)
        # All tensor ranks have the same.
        if policy is not None and reference is not None and mesh.tensor_rank == 0:
            total += (torch.cat(policy) - torch.cat(reference)).sum()
        return (all_reduce_sum(total, mesh.everyone) / num_samples).clamp(min=0.0)


def open_stage(config: KTOConfig, training: bool = True) -> ModelTask:
    """Open tokenizer, template and data. Raises InputError where they cannot be used."""
    config, tokenizer, data = open_chat(config, training, mismatched=True)
    return ModelTask(config, tokenizer, data, KTOObjective(config.kto), KTOReference)


STAGE = Stage(KTOConfig, open_stage, lambda config: with_reference_model(KTOObjective(config.kto), config))
