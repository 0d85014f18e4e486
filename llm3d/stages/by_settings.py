"""What any stage's settings ask for, found by their kind."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from llm3d.config import Config, DPOConfig, PPOConfig, RewardConfig, SFTConfig
from llm3d.data.packed import PackedBatch, collate, with_noise
from llm3d.data.samples import Sample, Tokens
from llm3d.errors import InputError
from llm3d.stages import dpo, reward, sft
from llm3d.stages.chat import OpenedChat
from llm3d.train.objective import Objective
from llm3d.train.trainer import next_token


def open_chat_stage(config: Config) -> OpenedChat:
    """Open what the settings of a stage after pretraining name. Raises InputError where it cannot be used."""
    if isinstance(config, SFTConfig):
        return sft.open_stage(config)
    if isinstance(config, RewardConfig):
        return reward.open_stage(config)
    if isinstance(config, DPOConfig):
        return dpo.open_stage(config)
    if isinstance(config, PPOConfig):
        raise InputError("these settings are for ppo, whose data are prompts; --stage names another stage")
    raise InputError("these settings are for pretraining, which has no samples; --stage names another stage")


def objective_of(config: Config) -> Objective:
    if isinstance(config, RewardConfig):
        return reward.RewardObjective(config.reward)
    return dpo.PreferenceObjective(config.dpo) if isinstance(config, DPOConfig) else next_token(config)


def largest_microbatch(config: Config) -> PackedBatch:
    """The most that goes through the model at once, without content: batch.micro of the longest sequences.

    Replies to compare come in pairs, so the last pair of an odd number is half as long.
    """
    micro, length = config.batch.micro, config.data.sequence_length
    if isinstance(config, RewardConfig | DPOConfig):
        lengths = [length] * (micro // 2) + [length // 2] * (micro % 2)
        samples = [Sample((_blank(n), _blank(n)), (0.0, 1.0)) for n in lengths if n]
    else:
        samples = [Sample((_blank(length),))] * micro
    batch = replace(
        collate(samples, config.parallel.tensor if config.parallel.sequence else 1), step_samples=1
    )
    alpha = config.sft.neftune_alpha if isinstance(config, SFTConfig) else 0.0
    if alpha or config.lora.dropout:
        batch = with_noise(batch, range(batch.num_sequences), alpha / math.sqrt(config.model.hidden_size))
    return batch


def _blank(length: int) -> Tokens:
    return Tokens(np.zeros(length, dtype=np.int32), np.ones(length, dtype=bool))
