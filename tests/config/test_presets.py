"""Preset shapes are those of the published models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm3d.config import ModelConfig, make_config
from llm3d.config.presets import PRESETS

# Of the published weights.
PUBLISHED = {
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}
# What the name promises, and the vocabulary with which it does.
ROUGHLY = {"llama-tiny": (1e6, 2000), "llama-20m": (20e6, 16_000), "llama-160m": (160e6, 32_000)}


def resolved(model: dict[str, object]) -> ModelConfig:
    others = {
        "run": {"dir": "runs/test"},
        "data": {"train": "corpus", "sequence_length": 8},
        "batch": {"global": 1},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1},
    }
    return make_config({"model": model} | others).model


def with_vocabulary(name: str) -> dict[str, object]:
    return {"preset": name} | ({"vocab_size": ROUGHLY[name][1]} if name in ROUGHLY else {})


def test_every_preset_has_its_size_checked() -> None:
    assert set(PRESETS) == set(PUBLISHED) | set(ROUGHLY)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_sizes(name: str, parameters: int) -> None:
    assert resolved({"preset": name}).num_parameters() == parameters


@pytest.mark.parametrize("name", ROUGHLY)
def test_small_shapes_are_about_as_large_as_they_say(name: str) -> None:
    assert resolved(with_vocabulary(name)).num_parameters() == pytest.approx(ROUGHLY[name][0], rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_counts_the_same_parameters(name: str) -> None:
    model = resolved(with_vocabulary(name))
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**transformers_fields(model)))
    assert model.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("name", ["llama-2-70b", "llama-3-8b", "llama-3.1-405b", "llama-1b"])
def test_a_shape_survives_transformers_config_json(name: str, tmp_path: Path) -> None:
    model = resolved({"preset": name})
    LlamaConfig(**transformers_fields(model)).save_pretrained(tmp_path)
    assert resolved({"path": str(tmp_path)}).model_copy(update={"path": None}) == model


def transformers_fields(model: ModelConfig) -> dict[str, object]:
    return model.model_dump(mode="json", exclude={"path"}, exclude_none=True)
