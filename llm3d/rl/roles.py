"""The models that stand beside each other in reinforcement learning, for who wants to know what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llm3d.config import PPOConfig, model_at, model_of_preset
from llm3d.config.presets import PRESETS
from llm3d.data.packed import collate
from llm3d.data.samples import Sample, Tokens
from llm3d.errors import InputError
from llm3d.generate.cache import BLOCK_SIZE
from llm3d.generate.engine import MAX_PREFILL_TOKENS
from llm3d.models.build import DTYPES, spread_layers
from llm3d.rl.losses import PolicyObjective, ValueObjective
from llm3d.rl.ppo import Models, critic_started_from, models_of, standing_beside
from llm3d.rl.rollout import RolloutBatch, writes_in_place, writing_layout
from llm3d.train.objective import Objective


class Role(NamedTuple):
    """kind: trained; asked now and then; or writing: the policy again, in the layout that replies are written in.

    averaged: an average of its weights is kept.
    """

    name: str
    kind: str
    config: PPOConfig
    objective: Objective
    microbatch: RolloutBatch
    averaged: bool = False


def roles_of(models: Models) -> list[Role]:
    """Every model that a run has, the policy first."""
    config, critic = models.config, models.critic
    microbatch = largest_microbatch(config)
    policy, values = PolicyObjective(config.ppo), ValueObjective(config.ppo)
    found = [Role("policy", "trained", config, policy, microbatch, averaged=bool(config.ppo.ema))]
    if critic is not None:
        found.append(Role("critic", "trained", critic, values, microbatch))
    if not config.lora.rank:
        found.append(Role("reference", "asked", config, policy, microbatch))
    for i, other in enumerate(models.rewards):
        if other is not None and not critic_started_from(critic, other, config):
            found.append(Role(f"reward model {i}", "asked", other, values, microbatch))
    if not writes_in_place(config):
        found.append(Role("policy that writes", "writing", writing_layout(config), policy, microbatch))
    return found


def planned_models(config: PPOConfig) -> tuple[Models, list[str]]:
    """The models of a run, which need not be there: a preset's name will do for a directory; and what is to be said.

    Where the policy is planned without weights, one that is neither is taken to be as large. Raises InputError.
    """
    remarks = dict[str, str]()

    def found(path: str | None, setting: str) -> PPOConfig:
        model = config.model
        if path is not None and Path(path).is_dir():
            model = model_at(path)
        elif path is not None and path in PRESETS:
            model = model_of_preset(path, config.model.vocab_size)
        elif path is not None and model.path is not None:
            raise InputError(f"{setting}: no directory {path!r}; to plan without it, name a preset")
        elif path is not None:
            model = model.model_copy(update={"path": path})
            remarks.setdefault(path, f"{setting}: no directory {path!r}; taken to be as large as the policy")
        return standing_beside(config, model, str(path), setting)

    return models_of(config, found), list(remarks.values())


def largest_microbatch(config: PPOConfig) -> RolloutBatch:
    """The most that goes through a model at once, without content."""
    length = config.data.sequence_length
    tokens = Tokens(np.zeros(length, dtype=np.int32), np.ones(length, dtype=bool))
    multiple_of = config.parallel.tensor if config.parallel.sequence else 1
    batch = collate([Sample((tokens,))] * config.batch.micro, multiple_of)
    names = [name for name, kind in RolloutBatch.__annotations__.items() if kind == "Tensor"]
    tables = {name: torch.zeros(len(batch.tokens)) for name in names}
    values: dict[str, Any] = {**vars(batch), **tables, "num_terms": batch.num_targets}
    return RolloutBatch(**values)


def bytes_of_writing(config: PPOConfig) -> int:
    """Keys and values, and activations of prompts being read, on the rank with most layers; not the weights."""
    layout = writing_layout(config)
    asked, model, size = layout.generate, layout.model, DTYPES[layout.precision.compute].itemsize
    sequences, tensor = max(asked.max_sequences, asked.num_replies), layout.parallel.tensor
    heads = max(1, model.num_key_value_heads // tensor)
    stages = layout.parallel.layers_per_stage
    num_layers = max(stages or spread_layers(model.num_hidden_layers, layout.parallel.pipeline))
    block = 2 * BLOCK_SIZE * heads * model.head_dim * size * num_layers
    cache = block * sequences * -(-layout.data.sequence_length // BLOCK_SIZE)
    cache = cache if asked.cache_bytes is None else min(cache, asked.cache_bytes)
    longest = layout.data.sequence_length - asked.max_new_tokens
    tokens = min(sequences * longest, max(MAX_PREFILL_TOKENS, longest))
    width = 6 * model.hidden_size + 3 * model.intermediate_size // tensor
    logits = sequences * (model.vocab_size or 0) // tensor
    return cache + tokens * width * size + 3 * logits * 4
