"""A reward model: a score for a reply, the higher the better, learned from comparisons.

Pairs as in Bradley and Terry 1952; all pairs of a ranked list from one forward pass, Ouyang et al. 2022 (InstructGPT),
section 3.5; margins, Touvron et al. 2023 (Llama 2), section 3.2.2; centring, Eisenstein et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm3d.config import ModelConfig, RewardConfig, RewardSettings
from llm3d.data.conversations import open_chat
from llm3d.data.packed import PackedBatch
from llm3d.models.heads import HeadName
from llm3d.stages.stage import ModelTask, Stage, one_model
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.tokenizer import Tokenizer
from llm3d.train.objective import of_padding


def reward_loss(better: Tensor, worse: Tensor, margins: Tensor, center: float) -> Tensor:
    """-log sigmoid(better - worse - margin) + center (better + worse)^2 of each pair. All fp32 [pairs]."""
    loss = -logsigmoid(better - worse - margins)
    return loss + center * (better + worse).square() if center else loss


@dataclass(frozen=True)
class RewardObjective:
    """`reward_loss` over a batch's pairs; each list of replies counts once. Names as TRL reports them."""

    settings: RewardSettings
    head: HeadName = "score"
    unit: str = "sample"
    sums: tuple[str, ...] = ("accuracy", "margin", "mean_reward")
    maxima: tuple[str, ...] = ("max_reward", "min_reward")

    def count(self, batch: Any) -> int:
        return batch.num_samples

    def __call__(self, output: Tensor, batch: PackedBatch) -> Tensor:
        """output: scores, fp32 [tokens]; a reply's reward is that of its last token."""
        if not batch.num_sequences:
            return of_padding(output, self)
        weights, rewards = batch.pair_weights, output[batch.last_tokens]
        better, worse = rewards[batch.better], rewards[batch.worse]
        margins = batch.margins if self.settings.margin else torch.zeros_like(better)
        loss = (weights * reward_loss(better, worse, margins, self.settings.center)).sum()
        mean = 0.5 * (better + worse)
        reported = (weights * torch.stack([(better > worse).float(), better - worse, mean])).sum(1)
        extremes = torch.stack([rewards.max(), -rewards.min()])
        return torch.cat([loss[None], reported.detach(), extremes.detach()])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"min_reward": -means["min_reward"]}


def open_stage(config: RewardConfig, training: bool = True) -> ModelTask:
    """Open tokenizer, template and data. Raises InputError where they cannot be used."""
    config, tokenizer, data = open_chat(config, training)
    pad_id = padding_token(config.model, tokenizer.tokenizer)
    model = config.model.model_copy(update={"pad_token_id": pad_id})
    # transformers tells padding by the model's token, so the tokenizer's must be the same.
    tokenizer = ChatTokenizer(tokenizer.tokenizer, tokenizer.template, pad_id)
    config = config.model_copy(update={"model": model})
    return ModelTask(config, tokenizer, data, RewardObjective(config.reward))


def padding_token(model: ModelConfig, tokenizer: Tokenizer) -> int | None:
    """The model's padding token, or another one where it has none, or has the end token for it.

    transformers scores the last token that is no padding; in a reply that should be its end token.
    """
    end = model.eos_token_id
    ends = end if isinstance(end, tuple) else (end,)
    choices = (model.pad_token_id, tokenizer.special_id("<unk>"), tokenizer.bos_id)
    return next((token for token in choices if token is not None and token not in ends), None)


STAGE = Stage(RewardConfig, open_stage, one_model(lambda config: RewardObjective(config.reward)))
