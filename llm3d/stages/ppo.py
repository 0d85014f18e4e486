"""Reinforcement learning from rewards: PPO, GRPO and RLOO; see `llm3d.rl.learner` for the step.

The policy is trained; with PPO so is the critic, which predicts rewards. The reference, which is the starting model,
and the reward models are frozen. All stand on the same devices, under the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from llm3d.config import PPOConfig
from llm3d.data.pretraining import PretrainingData
from llm3d.data.prompts import PromptData, read_prompt_sets
from llm3d.data.run_tokenizer import check_token_ids, corpora, end_ids, open_tokenizer
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from llm3d.rl.learner import VALIDATED, PPOLearner, PPOModels
from llm3d.rl.losses import PolicyObjective, ValueObjective
from llm3d.rl.models import (
    companion_config,
    critic_started_from,
    holds_scores,
    planned_settings,
    settings_of_models,
)
from llm3d.rl.rewards import RewardFunction, Scorer, reward_names, spread_of_scores
from llm3d.rl.rollout import blank_rollout_batch, generation_config, shares_layout
from llm3d.stages.stage import ModelRole, Models, Stage, largest_microbatch
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.streaming import Detokenizer
from llm3d.text.templates import load_template
from llm3d.text.tokenizer import Tokenizer
from llm3d.train.frozen import FrozenModel, Kept
from llm3d.train.trainer import ShardedModel, Trainer


@dataclass(frozen=True)
class PPOTask:
    """A `llm3d.stages.stage.Task`.

    rewards: of each source, the settings of its model, or its function.  critic: its settings; None: there is none.
    texts: that the policy goes on learning.
    """

    config: PPOConfig
    tokenizer: ChatTokenizer
    data: PromptData
    detokenizer: Detokenizer
    rewards: list[PPOConfig | RewardFunction]
    critic: PPOConfig | None
    texts: PretrainingData | None

    @property
    def validation_names(self) -> Sequence[str]:
        none, size = torch.zeros(self.config.generate.num_replies), self.config.generate.num_replies
        names = reward_names(self.config.ppo.rewards)
        return [*VALIDATED, *spread_of_scores(names, [none] * len(names), none, size)]

    def learner(self, mesh: Mesh, training: bool = True) -> PPOLearner:
        config, objective = self.config, PolicyObjective(self.config.ppo)
        values = ValueObjective(config.ppo)
        own: Kept = "on_device" if mesh.device.type == "cpu" else "offloaded"
        policy = (Trainer if training else ShardedModel)(config, mesh, objective)
        critic = None if self.critic is None else Trainer(self.critic, mesh, values)

        def scorer(source: PPOConfig | RewardFunction) -> Scorer:
            if isinstance(source, RewardFunction):
                return source
            if critic is not None and critic_started_from(self.critic, source, config):
                return FrozenModel(critic, "in_trained_model")
            return FrozenModel(ShardedModel(source, mesh, values), own)

        reference = (
            FrozenModel(policy, "in_trained_model")
            if config.lora.rank
            else FrozenModel(ShardedModel(config, mesh, objective), own)
        )
        models = PPOModels(policy, critic, reference, [scorer(source) for source in self.rewards])
        return PPOLearner(models, self.detokenizer, self.tokenizer.template, self.texts, self.data.record)


def open_stage(config: PPOConfig, training: bool = True) -> PPOTask:
    """Open tokenizer, template, prompts and reward functions. Raises InputError where they cannot be used."""
    config, tokenizer = open_tokenizer(config)
    assert tokenizer is not None, "a model to start from has a tokenizer"
    _, critic, models = settings_of_models(config, partial(companion_config, config, tokenizer))
    for i, model in enumerate(models):
        if model is not None and not holds_scores(model):
            raise InputError(
                f"ppo.rewards[{i}].model: {model.model.path} has no score head; name a trained reward model"
            )
    template = load_template(config.data.template, tokenizer)
    train, valid = read_prompt_sets(template, config, training)
    detokenizer = Detokenizer(tokenizer, end_ids(config, tokenizer, template), config.generate.stop)
    prompts = [prompt for prompt_set in (*train, *valid) for prompt in prompt_set.prompts]
    rewards = [
        model or RewardFunction(source, f"ppo.rewards[{i}].function", prompts)
        for i, (source, model) in enumerate(zip(config.ppo.rewards, models, strict=True))
    ]
    return PPOTask(
        config,
        ChatTokenizer(tokenizer, template),
        PromptData(config, train, valid),
        detokenizer,
        rewards,
        critic if training else None,
        _open_texts(config, tokenizer) if training else None,
    )


def _open_texts(config: PPOConfig, tokenizer: Tokenizer) -> PretrainingData | None:
    """What ppo.ptx_data names. Raises InputError where it cannot be read, or its ids mean something else."""
    sources = [(source.path, source.weight) for source in config.ppo.ptx_data]
    assert config.model.vocab_size is not None, "the tokenizer has told it"
    if not sources:
        return None
    check_token_ids(tokenizer, corpora(config.ppo.ptx_data, "ppo.ptx_data", "train"))
    return PretrainingData(sources, config.data.sequence_length, config.run.seed, config.model.vocab_size)


def models(config: PPOConfig) -> Models:
    """Every model that a run has. A preset's name will do for a directory of one that is not there yet."""
    (config, critic, rewards), remarks = planned_settings(config)
    microbatch = blank_rollout_batch(largest_microbatch(config))
    policy, values = PolicyObjective(config.ppo), ValueObjective(config.ppo)
    roles = [ModelRole("policy", "trained", config, policy, microbatch, averaged=bool(config.ppo.ema))]
    if critic is not None:
        roles.append(ModelRole("critic", "trained", critic, values, microbatch))
    if not config.lora.rank:
        roles.append(ModelRole("reference", "frozen", config, policy, microbatch))
    for i, reward in enumerate(rewards):
        if reward is not None and not critic_started_from(critic, reward, config):
            roles.append(ModelRole(f"reward model {i}", "frozen", reward, values, microbatch))
    if not shares_layout(config):
        roles.append(ModelRole("rollout policy", "rollout", generation_config(config), policy, microbatch))
    return Models(roles, remarks)


STAGE = Stage(PPOConfig, open_stage, models)
