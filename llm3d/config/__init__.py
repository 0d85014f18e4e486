"""Every setting: typed, frozen, and checked across sections before any process group is made.

`load_config` reads YAML and `section.key=value` overrides into a `Config`; `config_to_yaml` writes one back.
Whatever the user got wrong is an `InputError` with one line for each setting at fault: its path, what was
given, what is allowed, and the nearest valid name. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from llm3d.config.checks import check_generation, check_layout, check_plan
from llm3d.config.data import ChatDataConfig, ChatSource, DataSource
from llm3d.config.explain import nearest, show, validate
from llm3d.config.hugging_face import hugging_face_directory, hugging_face_shape
from llm3d.config.peft import peft_settings
from llm3d.config.presets import PRESETS
from llm3d.config.schema import json_schema
from llm3d.config.sections import (
    DPOSettings,
    GenerateSettings,
    LoRASettings,
    LossConfig,
    LossScaleConfig,
    ModelConfig,
    ParallelConfig,
    PPOSettings,
    RewardSettings,
    RewardSource,
    ZeroConfig,
)
from llm3d.config.settings_file import read_settings, settings_to_yaml
from llm3d.config.stages import (
    STAGES,
    ComparisonConfig,
    Config,
    DPOConfig,
    KTOConfig,
    KTOSettings,
    ORPOConfig,
    ORPOSettings,
    PostTrainingConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    SimPOConfig,
    SimPOSettings,
)
from llm3d.config.training import EpochsConfig, OptimConfig
from llm3d.errors import InputError

__all__ = [
    "STAGES",
    "ChatDataConfig",
    "ChatSource",
    "ComparisonConfig",
    "Config",
    "DPOConfig",
    "DPOSettings",
    "DataSource",
    "EpochsConfig",
    "GenerateSettings",
    "KTOConfig",
    "KTOSettings",
    "LoRASettings",
    "LossConfig",
    "LossScaleConfig",
    "ModelConfig",
    "ORPOConfig",
    "ORPOSettings",
    "OptimConfig",
    "PPOConfig",
    "PPOSettings",
    "ParallelConfig",
    "PostTrainingConfig",
    "PretrainConfig",
    "RewardConfig",
    "RewardSettings",
    "RewardSource",
    "SFTConfig",
    "SimPOConfig",
    "SimPOSettings",
    "ZeroConfig",
    "check_generation",
    "check_layout",
    "check_plan",
    "config_to_yaml",
    "json_schema",
    "kind_of",
    "load_config",
    "make_config",
    "model_at",
    "model_of_preset",
    "parse_config",
    "with_vocab_size",
]


C = TypeVar("C", bound=Config)


@overload
def load_config(
    path: str | Path, overrides: Sequence[str] = (), world_size: int | None = 1
) -> PretrainConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], world_size: int | None, kind: type[C]) -> C: ...
def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    world_size: int | None = 1,
    kind: type[Config] = PretrainConfig,
) -> Config:
    """The settings in a YAML file, with `section.key=value` overrides on top.

    An override replaces what it names; one of model.preset or model.path replaces the file's model section.
    World size None leaves out the checks that need one. Raises InputError.
    """
    return make_config(read_settings(path, overrides), world_size, kind)


@overload
def make_config(settings: Mapping[Any, Any], world_size: int | None = 1) -> PretrainConfig: ...
@overload
def make_config(settings: Mapping[Any, Any], world_size: int | None, kind: type[C]) -> C: ...
def make_config(
    settings: Mapping[Any, Any], world_size: int | None = 1, kind: type[Config] = PretrainConfig
) -> Config:
    """The settings in a dictionary as YAML would give it. Raises InputError."""
    config = parse_config(settings, kind)
    check_layout(config, world_size)
    return config


def parse_config(settings: Mapping[Any, Any], kind: type[C]) -> C:
    """The same, each setting alone: whether they fit each other is not checked."""
    filled = _with_defaults(settings, kind)
    if isinstance(filled.get("model"), dict):
        filled["model"] = _resolve_model(filled["model"])
    if isinstance(filled["lora"], dict) and isinstance(filled["lora"].get("path"), str):
        filled["lora"] = _resolve_lora(filled["lora"])
    return validate(kind, filled)


def model_at(path: str) -> ModelConfig:
    """The model in a Hugging Face directory or a checkpoint. Raises InputError."""
    return validate(ModelConfig, _from_directory(path, {}) | {"path": path}, ("model",))


def model_of_preset(name: str, vocab_size: int | None) -> ModelConfig:
    """The shape of a preset, under its name; vocab_size: where it has none of its own."""
    return validate(ModelConfig, {"vocab_size": vocab_size} | PRESETS[name] | {"path": name}, ("model",))


def kind_of(path: str | Path) -> type[Config]:
    """Which stage a settings file is for: the one whose section it has, else pretraining. Raises InputError."""
    settings = read_settings(path, ())
    return next((STAGES[name] for name in settings if name in STAGES), PretrainConfig)


def config_to_yaml(config: Config) -> str:
    """The resolved settings; loading them gives an equal Config."""
    return settings_to_yaml(config.model_dump(mode="json", by_alias=True))


def with_vocab_size(config: C, vocab_size: int) -> C:
    """The same settings with the vocabulary size that the tokenizer has."""
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


# ---- defaults that depend on other sections ----


def _with_defaults(settings: Mapping[Any, Any], kind: type[Config]) -> dict[Any, Any]:
    """A section that is absent or empty takes its defaults, or has its own settings named as missing."""
    filled = {name: given for name, given in settings.items() if given is not None or name == "recompute"}
    return {name: {} for name in kind.model_fields if name not in ("model", "recompute")} | filled


# ---- sections that name a directory ----


def _resolve_lora(given: dict[Any, Any]) -> dict[Any, Any]:
    """The fields of LoRASettings that a PEFT directory has; what the user gives beside must agree."""
    stored = peft_settings(given["path"])
    for name in stored:
        given_value = sorted(given[name]) if isinstance(given.get(name), list) else given.get(name)
        stored_value = sorted(stored[name]) if isinstance(stored[name], list) else stored[name]
        if name in given and given_value != stored_value:
            raise InputError(
                f"lora.{name}: {show(given[name])} is not what lora.path has, {show(stored[name])}"
            )
    return stored | given


def _resolve_model(given: dict[Any, Any]) -> dict[Any, Any]:
    """The fields of ModelConfig: those of the preset or of the directory's config.json filled in."""
    preset, path = given.get("preset"), given.get("path")
    rest = {key: value for key, value in given.items() if key not in ("preset", "path")}
    if preset is not None and path is not None:
        raise InputError("model: preset and path exclude each other; keep one of them")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(
                f"model.preset: {show(preset)} is not one of {', '.join(PRESETS)}{nearest(preset, PRESETS)}"
            )
        return PRESETS[preset] | rest
    if isinstance(path, str):
        return _from_directory(path, rest)
    return rest if path is None else given


def _from_directory(path: str, rest: dict[Any, Any]) -> dict[str, Any]:
    """The fields in a Hugging Face directory's config.json; of what the user gives beside, only tokens may differ."""
    file = hugging_face_directory(path) / "config.json"
    fields = hugging_face_shape(file) | {"path": path}
    stored = validate(ModelConfig, fields, ("model",), source=f" (in {file})")
    shape = stored.model_dump(mode="json")
    requested = validate(ModelConfig, shape | rest, ("model",))
    tokens = {name: rest[name] for name in rest if name.endswith("token_id")}
    for name in rest.keys() - tokens.keys():
        if getattr(requested, name) != getattr(stored, name):
            raise InputError(
                f"model.{name}: {show(rest[name])} is not what {file} says, {show(shape[name])}; "
                f"with model.path, leave the shape out"
            )
    return shape | tokens
