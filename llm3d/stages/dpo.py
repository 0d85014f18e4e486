"""Direct preference optimization: a policy that prefers the chosen replies more than its reference does.

Rafailov et al. 2023. With r(y) = beta (log p(y) - log p_reference(y)), the implicit reward of a reply, the loss of a
pair is -log sigmoid(r(chosen) - r(rejected)), or one of its relatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm3d.config import DPOConfig, DPOSettings
from llm3d.data.conversations import open_chat
from llm3d.data.packed import PackedBatch
from llm3d.models.heads import HeadName
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.stages.pairs import PAIR_METRICS, pair_metrics
from llm3d.stages.reference import (
    CachedReference,
    LiveReference,
    sequence_log_probabilities,
    with_reference_model,
)
from llm3d.stages.stage import Models, ModelTask, Stage, one_model
from llm3d.train.learner import Reference
from llm3d.train.objective import of_padding
from llm3d.train.trainer import ShardedModel


def dpo_loss(difference: Tensor, settings: DPOSettings) -> Tensor:
    """The loss of each pair, fp32 [pairs].

    difference: [pairs], (log p - log p_reference)(chosen) - the same of rejected; per token for ipo.

    sigmoid: Rafailov et al. 2023, with label smoothing Mitchell 2023 (cDPO).  robust: Chowdhury et al. 2024.
    hinge: Zhao et al. 2023 (SLiC).  ipo: Azar et al. 2023, the distance to 1 / (2 beta).
    """
    logits, flipped = settings.beta * difference, settings.label_smoothing
    if settings.loss == "hinge":
        return torch.relu(1 - logits)
    if settings.loss == "ipo":
        return (difference - 1 / (2 * settings.beta)).square()
    if settings.loss == "robust":
        return (-(1 - flipped) * logsigmoid(logits) + flipped * logsigmoid(-logits)) / (1 - 2 * flipped)
    return -(1 - flipped) * logsigmoid(logits) - flipped * logsigmoid(-logits)


@dataclass(frozen=True)
class PreferenceObjective:
    """`dpo_loss` over a batch's pairs, and what TRL's users watch, under the names that they know.

    nll_loss is TRL's: over all tokens of the chosen replies alike, whatever dpo.rpo_mean adds to the loss.
    """

    settings: DPOSettings
    head: HeadName = "language"
    unit: str = "sample"
    sums: tuple[str, ...] = (*PAIR_METRICS, "nll_loss", "chosen_targets")
    maxima: tuple[str, ...] = ()

    def count(self, batch: Any) -> int:
        return batch.num_samples

    def __call__(self, output: TokenTerms, batch: PackedBatch) -> Tensor:
        settings, weights = self.settings, batch.pair_weights
        if not batch.num_sequences:
            return of_padding(output.log_probabilities, self)
        log_p = sequence_log_probabilities(output, batch)
        above_reference = log_p - (0.0 if batch.reference is None else batch.reference)
        lengths = batch.target_counts
        compared = above_reference
        if settings.loss == "ipo" or settings.length_normalized:
            compared = above_reference / lengths
        difference = compared[batch.better] - compared[batch.worse]
        per_sequence = settings.rpo_mean == "sequence"
        length = lengths if per_sequence else batch.step_chosen_targets / batch.step_samples
        nll = -(weights * (log_p / length)[batch.better]).sum()
        loss = (weights * dpo_loss(difference, settings)).sum() + settings.rpo_alpha * nll
        rewards = settings.beta * above_reference
        metrics = [*pair_metrics(rewards, log_p, batch), -log_p[batch.better], lengths[batch.better]]
        return torch.cat([loss[None], (weights * torch.stack(metrics)).sum(1).detach()])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        *others, (_, nll), (_, targets) = means.items()
        return dict(others) | {"nll_loss": nll / targets}


def open_stage(config: DPOConfig, training: bool = True) -> ModelTask:
    """Open tokenizer, template and data. Raises InputError where they cannot be used."""
    config, tokenizer, data = open_chat(config, training)
    references: dict[str, Callable[[ShardedModel], Reference] | None] = {
        "cached": partial(CachedReference, data=data),
        "live": LiveReference,
        "none": None,
    }
    objective = PreferenceObjective(config.dpo)
    return ModelTask(config, tokenizer, data, objective, references[config.dpo.reference])


def models(config: DPOConfig) -> Models:
    """With the reference where it is a model of its own."""
    objective = PreferenceObjective(config.dpo)
    if config.dpo.reference == "live":
        return with_reference_model(objective, config)
    return one_model(lambda config: objective)(config)


STAGE = Stage(DPOConfig, open_stage, models)
