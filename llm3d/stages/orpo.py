"""Odds ratio preference optimization: learns the chosen replies, and to prefer them, without a reference model.

Hong, Lee and Thorne 2024. With p(y) = exp(mean log-probability of the reply's tokens) and odds(y) = p / (1 - p), a pair
costs -log-likelihood(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm3d.config import ORPOConfig, ORPOSettings
from llm3d.data.conversations import open_chat
from llm3d.data.packed import PackedBatch
from llm3d.models.heads import HeadName
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.stages.pairs import PAIR_METRICS, pair_metrics
from llm3d.stages.stage import ModelTask, Stage, one_model
from llm3d.train.objective import of_padding


def log_odds(mean_log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_log_p), fp32 [sequences], none above 0; near p = 1 without cancellation."""
    return mean_log_p - torch.where(
        mean_log_p > -0.693, torch.log(-torch.expm1(mean_log_p)), torch.log1p(-torch.exp(mean_log_p))
    )


@dataclass(frozen=True)
class ORPOObjective:
    """The loss of a batch's pairs, and what TRL's users watch, under the names that they know.

    The likelihood is a mean over all tokens of a step's chosen replies, as in TRL, but not over their prompts'.
    """

    settings: ORPOSettings
    head: HeadName = "language"
    unit: str = "sample"
    sums: tuple[str, ...] = (*PAIR_METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen")
    maxima: tuple[str, ...] = ()

    def count(self, batch: Any) -> int:
        return batch.num_samples

    def __call__(self, output: TokenTerms, batch: PackedBatch) -> Tensor:
        beta, weights = self.settings.beta, batch.pair_weights
        if not batch.num_sequences:
            return of_padding(output.log_probabilities, self)
        log_p = batch.sum_by_sequence(output.log_probabilities)
        mean_log_p = log_p / batch.target_counts
        odds = log_odds(mean_log_p)
        difference = odds[batch.better] - odds[batch.worse]
        ratio = logsigmoid(difference)
        nll = -log_p[batch.better] * batch.step_samples / batch.step_chosen_targets
        metrics = [*pair_metrics(beta * mean_log_p, mean_log_p, batch), nll, ratio, difference]
        loss = (weights * (nll - beta * ratio)).sum()
        return torch.cat([loss[None], (weights * torch.stack(metrics)).sum(1).detach()])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means


def open_stage(config: ORPOConfig, training: bool = True) -> ModelTask:
    """Open tokenizer, template and data. Raises InputError where they cannot be used."""
    config, tokenizer, data = open_chat(config, training)
    return ModelTask(config, tokenizer, data, ORPOObjective(config.orpo))


STAGE = Stage(ORPOConfig, open_stage, one_model(lambda config: ORPOObjective(config.orpo)))
