"""Names and values of other frameworks are answered with ours."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from llm3d.config import STAGES, make_config
from llm3d.config.aliases import _NAMES, _VALUES
from llm3d.config.explain import setting_paths
from llm3d.errors import InputError
from tests.config.sections import SECTIONS

PATHS = {stage: dict(setting_paths(kind)) for stage, kind in STAGES.items()}
ALL = {path: annotation for paths in PATHS.values() for path, annotation in paths.items()}


def test_every_hint_names_what_there_is() -> None:
    for name, hints in _NAMES.items():
        for hint in hints:
            path, _, value = hint.partition("=")
            assert path in ALL, name
            assert not value or value in choices(ALL[path]), name
    for path, values in _VALUES.items():
        assert path in ALL
        assert set(values.values()) <= choices(ALL[path]), path
        assert not values.keys() & choices(ALL[path]), path


def choices(annotation: Any) -> set[Any]:
    """Of a Literal, also where it may be None."""
    found = get_args(annotation)
    return {choice for each in found for choice in (get_args(each) or [each])}


def test_no_alias_is_the_full_name_of_a_setting() -> None:
    assert not {name for name in _NAMES if name in ALL or name in SECTIONS}


NAMES = {
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "batch.micro",
    "gradient_accumulation_steps": "batch.global",
    "tp": "parallel.tensor",
    "tensor-model-parallel-size": "parallel.tensor",
    "parallel.pp": "parallel.pipeline",
    "cutoff_len": "data.sequence_length",
    "data.max_seq_length": "data.sequence_length",
    "r": "lora.rank",
    "lora.r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "bf16": "precision.compute=bf16",
    "output_dir": "run.dir",
    "model_name_or_path": "model.path",
    "gradient_checkpointing": "recompute",
    "eval_steps": "train.eval_every",
    "train.logging_steps": "log.every",
}
OF_STAGES = {
    ("dpo", "beta"): "dpo.beta",
    ("ppo", "beta"): "ppo.kl_coefficient",
    ("ppo", "num_generations"): "generate.num_replies",
    ("orpo", "lambda"): "orpo.beta",
    ("simpo", "simpo_gamma"): "simpo.gamma",
    ("kto", "beta"): "kto.beta",
}
SETTINGS = {
    "run": {"dir": "x"},
    "model": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    "data": {"train": ["x"], "sequence_length": 8},
    "batch": {"global": 1},
    "optim": {"lr": 1.0},
    "train": {"steps": 1},
    "ppo": {"rewards": [{"function": "f.py:f"}]},
}


def complaint(stage: str, path: str, value: object) -> str:
    settings = {name: SETTINGS[name] for name in SETTINGS if name != "ppo" or stage == "ppo"}
    section, _, name = path.rpartition(".")
    changed = {**settings.get(section, {}), name: value} if section else value
    with pytest.raises(InputError) as caught:
        make_config(settings | {section or name: changed}, None, STAGES[stage])
    return str(caught.value)


@pytest.mark.parametrize(("name", "ours"), NAMES.items())
def test_a_name_of_another_framework(name: str, ours: str) -> None:
    assert complaint("sft", name, 1) == f"{name}: unknown setting; did you mean {ours}?"


@pytest.mark.parametrize(("stage_and_name", "ours"), OF_STAGES.items(), ids=str)
def test_a_name_means_what_the_stage_has(stage_and_name: tuple[str, str], ours: str) -> None:
    assert complaint(*stage_and_name, 1).endswith(f": unknown setting; did you mean {ours}?")


def test_the_section_of_another_stage_is_told_from_its_own() -> None:
    assert complaint("orpo", "dpo", {}) == "dpo: unknown setting; in settings for orpo this section is orpo"


@pytest.mark.parametrize(
    ("path", "value", "ours"),
    [
        ("data.turns", "each", "split"),
        ("data.truncation", "keep_start", "right"),
        ("data.truncation", "Truncate", "right"),
        ("precision.compute", "bfloat16", "bf16"),
        ("precision.compute", "torch.float16", "fp16"),
        ("recompute", True, "full"),
        ("zero.offload", "cpu", "optimizer"),
        ("optim.schedule", "warmup-stable-decay", "wsd"),
    ],
)
def test_a_value_of_another_framework(path: str, value: object, ours: str) -> None:
    assert complaint("sft", path, value).endswith(f"; did you mean {ours}?")
