"""A config.json is read as transformers reads it, or refused by the name of what is not built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llm3d.config import ModelConfig, model_at
from llm3d.errors import InputError
from llm3d.kernels.rope import inverse_frequencies

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 128}
# What published models and different versions of transformers write.
READ: dict[str, dict[str, Any]] = {
    "LLaMA": {
        "architectures": ["LLaMAForCausalLM"],
        "max_sequence_length": 2048,
        "pad_token_id": -1,
        "torch_dtype": "float16",
        "transformers_version": "4.27.0.dev0",
        "use_cache": True,
        "hidden_act": "silu",
    },
    "LLaMA 2": {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 1, "rope_scaling": None},
    "LLaMA 3.1": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "eos_token_id": [2, 5, 6],
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA_3},
    },
    "LLaMA 3.1 in transformers 5": {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA_3},
    },
    "llama3 without its first length": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
    },
    "CodeLlama": {"rope_theta": 1000000, "tie_word_embeddings": False, "num_key_value_heads": None},
    "Vicuna 16k": {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "max_sequence_length": 2048,
        "temperature": 0.9,
        "top_p": 0.6,
        "do_sample": True,
        "max_length": 4096,
    },
    "DeepSeek-Coder": {"rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "both names": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}},
    "default": {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 10000.0}},
    "SmolLM2": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    },
    "scorer": {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
    },
    "head_dim": {"head_dim": 32, "partial_rotary_factor": 1.0},
    "null": {"head_dim": None, "sliding_window": None, "quantization_config": None},
    "swish": {"hidden_act": "swish", "unsloth_version": "2026.1"},
}


def written(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read(directory: Path, config: dict[str, Any]) -> ModelConfig:
    return model_at(str(written(directory, config))).model_copy(update={"path": None})


@pytest.mark.parametrize("name", READ)
def test_a_config_means_what_transformers_takes_it_for(name: str, tmp_path: Path) -> None:
    config = SHAPE | READ[name]
    ours, theirs = read(tmp_path, config), LlamaConfig.from_pretrained(tmp_path)
    scaling = ours.rope_scaling.model_dump() if ours.rope_scaling else None
    frequencies = inverse_frequencies(ours.head_dim, ours.rope_theta, scaling)
    torch.testing.assert_close(frequencies, LlamaRotaryEmbedding(theirs).inv_freq, rtol=1e-6, atol=0)
    fields = ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
    assert {field: getattr(ours, field) for field in fields} == {
        field: getattr(theirs, field) for field in fields
    }
    rewritten = json.loads(theirs.to_json_string(use_diff=False))
    assert read(tmp_path / "rewritten", rewritten | {"pad_token_id": None}) == ours.model_copy(
        update={"pad_token_id": None}
    )


@pytest.mark.parametrize("version", ["of this transformers", "of the differences alone"])
def test_all_that_transformers_writes_of_a_default_llama_is_known(version: str, tmp_path: Path) -> None:
    text = LlamaConfig().to_json_string(use_diff=version != "of this transformers")
    assert read(tmp_path, json.loads(text) | {"model_type": "llama"}).num_parameters() == 6_738_415_616


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"is_causal": False}, "is_causal false is not supported"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not known here"),
        ({"attention_multiplier": 0.1}, "attention_multiplier 0.1 is not known here"),
        ({"logit_scale": 2.0}, "logit_scale 2.0 is not known here"),
        ({"rope_condense_ratio": 8}, "rope_condense_ratio 8 is not known here"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "default, linear, llama3"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 2.0}},
            "attention_factor 2.0",
        ),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", **LLAMA_3}}, "contradicts itself"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "contradicts itself"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "contradicts itself",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        ({"model_type": "qwen2"}, "supported are 'llama', 'qwen3'"),
    ],
    ids=str,
)
def test_what_changes_the_model_and_is_not_built_is_refused_by_name(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        read(tmp_path, SHAPE | changes)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"model.path: {tmp_path}")
