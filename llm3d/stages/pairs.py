"""What every loss that compares two replies reports, under the names that TRL's users know."""

from __future__ import annotations

from torch import Tensor

from llm3d.data.packed import PackedBatch

PAIR_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)


def pair_metrics(rewards: Tensor, log_p: Tensor, batch: PackedBatch) -> list[Tensor]:
    """Of each pair, fp32 [pairs], in the order of PAIR_METRICS.

    rewards, log_p: fp32 [sequences], a reply's implicit reward, and its log-probability, whole or a token's mean.
    """
    chosen, rejected = rewards[batch.better], rewards[batch.worse]
    accuracies, margins = (chosen > rejected).float(), chosen - rejected
    return [chosen, rejected, accuracies, margins, log_p[batch.better], log_p[batch.worse]]
