"""Which models reinforcement learning has beside the policy, and with which settings each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llm3d.checkpoint.hugging_face import has_score_head
from llm3d.config import Config, LoRASettings, ModelConfig, PPOConfig, check_plan, model_at, model_of_preset
from llm3d.config.hugging_face import hugging_face_directory
from llm3d.config.presets import PRESETS
from llm3d.data.run_tokenizer import Beside, check_token_ids
from llm3d.errors import InputError
from llm3d.text.tokenizer import Tokenizer
from llm3d.wording import counted


class ModelSettings(NamedTuple):
    """Of each model, without its weights.

    config: the policy's settings and the reference's.  critic: its settings; None: there is none.
    rewards: of each source, the settings of its model; None: it is a function.
    """

    config: PPOConfig
    critic: PPOConfig | None
    rewards: list[PPOConfig | None]


def settings_of_models(
    config: PPOConfig, settings_of: Callable[[str | None, str], PPOConfig]
) -> ModelSettings:
    """What the settings say of models. Raises InputError where they cannot stand beside each other.

    settings_of: the settings of the model in a directory, None for the policy's, which a setting names.
    """
    rewards = [
        None if source.model is None else settings_of(source.model, f"ppo.rewards[{i}].model")
        for i, source in enumerate(config.ppo.rewards)
    ]
    return ModelSettings(config, critic_settings(config, settings_of), rewards)


def critic_settings(
    config: PPOConfig, settings_of: Callable[[str | None, str], PPOConfig]
) -> PPOConfig | None:
    settings = config.ppo
    if settings.advantages != "gae":
        return None
    first_model = next((source.model for source in settings.rewards if source.model is not None), None)
    rate = settings.critic_lr or config.optim.lr
    least = config.optim.min_lr * rate / config.optim.lr
    critic = settings_of(settings.critic or first_model or config.model.path, "ppo.critic")
    lora = config.lora.model_copy(update={"path": None})
    optim = config.optim.model_copy(update={"lr": rate, "min_lr": least})
    return critic.model_copy(update={"lora": lora, "optim": optim})


def critic_started_from(critic: PPOConfig | None, reward_model: PPOConfig, policy: PPOConfig) -> bool:
    """Whether a reward model is what the critic's adapters stand on, and can be asked of it."""
    start = reward_model.model.path
    if critic is None or not critic.lora.rank or start == policy.model.path:
        return False
    return critic.model.path == start


def companion_config(config: PPOConfig, tokenizer: Tokenizer, path: str | None, setting: str) -> PPOConfig:
    """The settings of the model in a directory, with the policy's tokenizer. Raises InputError where it cannot be."""
    assert path is not None, "checked with the settings"
    companion = checked_companion(config, model_at(path), path, setting)
    named = Beside(setting, hugging_face_directory(path), "name a model with the policy's tokenizer")
    if not named.has_tokenizer:
        raise InputError(
            f"{setting}: {path} has no tokenizer, and nothing else says what token ids mean to it; "
            "copy the tokenizer that it was trained with beside its weights"
        )
    check_token_ids(tokenizer, [named])
    return companion


def checked_companion(config: PPOConfig, model: ModelConfig, path: str, setting: str) -> PPOConfig:
    """The settings of a model beside the policy, under its layout. Raises InputError where it cannot."""
    tokens, of_policy = model.vocab_size, config.model.vocab_size
    if tokens is None or of_policy is None or tokens < of_policy:
        raise InputError(
            f"{setting}: {path} has {tokens} tokens, the policy {of_policy}; it needs all of the policy's"
        )
    if config.data.sequence_length > model.max_position_embeddings:
        raise InputError(
            f"{setting}: {path} reads {counted(model.max_position_embeddings, 'token')}, fewer than "
            f"data.sequence_length {config.data.sequence_length}"
        )
    parallel = config.parallel
    if model.num_hidden_layers != config.model.num_hidden_layers:
        parallel = parallel.model_copy(update={"layers_per_stage": None})
    other = config.model_copy(update={"model": model, "parallel": parallel, "lora": LoRASettings()})
    try:
        check_plan(other, None)
    except InputError as error:
        raise InputError(f"{setting}: {path}: {error}") from None
    return other


def holds_scores(config: Config) -> bool:
    """Whether the model that the settings name has a reward model's head."""
    assert config.model.path is not None, "checked with the settings"
    return has_score_head(hugging_face_directory(config.model.path))


def planned_settings(config: PPOConfig) -> tuple[ModelSettings, list[str]]:
    """The models of a run, which need not be there: a preset's name will do for a directory; and what is to be said.

    Where the policy is planned without weights, one that is neither is taken to be as large. Raises InputError.
    """
    remarks = dict[str, str]()

    def settings_of(path: str | None, setting: str) -> PPOConfig:
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
        return checked_companion(config, model, str(path), setting)

    return settings_of_models(config, settings_of), list(remarks.values())
