"""Qwen3 (dense), as settings and a config.json know it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llm3d.config.llama import LLAMA, head_problems

if TYPE_CHECKING:
    from llm3d.config.sections import ModelConfig


def _layer_parameters(model: ModelConfig) -> int:
    return LLAMA.layer_parameters(model) + 2 * model.head_dim  # q_norm and k_norm


QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    defaults={
        **LLAMA.defaults,
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    only={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "attention_dropout": (0,),
        "partial_rotary_factor": (1,),
        "is_causal": (True,),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention",),
    },
    harmless=frozenset({"sliding_window", "max_window_layers"}),  # use_sliding_window alone makes them read
    fixed={
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
    },
    heads={
        "language": {"architectures": ["Qwen3ForCausalLM"]},
        "score": LLAMA.heads["score"] | {"architectures": ["Qwen3ForSequenceClassification"]},
    },
    layer_parameters=_layer_parameters,
    problems=head_problems,
)
