"""Simple preference optimization: a reply's reward is its mean log-probability, without a reference model.

Meng, Xia and Chen 2024. With r(y) = beta / |y| * log p(y | x), a pair costs
-log sigmoid(r(chosen) - r(rejected) - gamma).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm3d.config import SimPOConfig, SimPOSettings
from llm3d.data.conversations import open_chat
from llm3d.data.packed import PackedBatch
from llm3d.models.heads import HeadName
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.stages.pairs import PAIR_METRICS, pair_metrics
from llm3d.stages.stage import ModelTask, Stage, one_model
from llm3d.train.objective import of_padding


@dataclass(frozen=True)
class SimPOObjective:
    """The loss of a batch's pairs, and what TRL's CPOTrainer reports beside its loss_type simpo."""

    settings: SimPOSettings
    head: HeadName = "language"
    unit: str = "sample"
    sums: tuple[str, ...] = PAIR_METRICS
    maxima: tuple[str, ...] = ()

    def count(self, batch: Any) -> int:
        return batch.num_samples

    def __call__(self, output: TokenTerms, batch: PackedBatch) -> Tensor:
        if not batch.num_sequences:
            return of_padding(output.log_probabilities, self)
        mean_log_p = batch.sum_by_sequence(output.log_probabilities) / batch.target_counts
        rewards = self.settings.beta * mean_log_p
        margin = rewards[batch.better] - rewards[batch.worse]
        loss = -(batch.pair_weights * logsigmoid(margin - self.settings.gamma)).sum()
        reported = torch.stack(pair_metrics(rewards, mean_log_p, batch))
        return torch.cat([loss[None], (batch.pair_weights * reported).sum(1).detach()])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means


def open_stage(config: SimPOConfig, training: bool = True) -> ModelTask:
    """Open tokenizer, template and data. Raises InputError where they cannot be used."""
    config, tokenizer, data = open_chat(config, training)
    return ModelTask(config, tokenizer, data, SimPOObjective(config.simpo))


STAGE = Stage(SimPOConfig, open_stage, one_model(lambda config: SimPOObjective(config.simpo)))
