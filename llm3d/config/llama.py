"""LLaMA, as settings and a config.json know it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm3d.config.architecture import Architecture

if TYPE_CHECKING:
    from llm3d.config.sections import ModelConfig


def _layer_parameters(model: ModelConfig) -> int:
    heads = model.num_attention_heads + model.num_key_value_heads  # q and o, k and v
    attention = 2 * model.hidden_size * model.head_dim * heads
    mlp = 3 * model.hidden_size * model.intermediate_size
    return attention + mlp + 2 * model.hidden_size


def _problems(model: ModelConfig, tensor: int) -> Iterator[str]:
    heads = model.num_attention_heads
    if model.hidden_size % heads:  # transformers refuses such a model, whatever its head_dim
        yield f"model.num_attention_heads: {heads} does not divide model.hidden_size {model.hidden_size}"
    yield from head_problems(model, tensor)


def head_problems(model: ModelConfig, tensor: int) -> Iterator[str]:
    """Those of any family with LLaMA's heads and MLP."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % kv_heads:
        yield f"model.num_key_value_heads: {kv_heads} does not divide model.num_attention_heads {heads}"
    if model.head_dim % 2:
        yield f"model.head_dim: {model.head_dim} is odd; rotary embeddings need an even one"
    if heads % tensor:
        yield f"parallel.tensor: {tensor} does not divide model.num_attention_heads {heads}"
    if kv_heads % tensor and tensor % kv_heads:
        yield (
            f"parallel.tensor: {tensor} neither divides model.num_key_value_heads {kv_heads} "
            f"nor is a multiple of it"
        )
    if model.intermediate_size % tensor:
        yield f"parallel.tensor: {tensor} does not divide model.intermediate_size {model.intermediate_size}"


LLAMA = Architecture(
    model_type="llama",
    defaults={
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    only={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0,),
        "partial_rotary_factor": (1,),
        "is_causal": (True,),
    },
    fixed={"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False},
    heads={
        "language": {"architectures": ["LlamaForCausalLM"]},
        "score": {
            "architectures": ["LlamaForSequenceClassification"],
            "num_labels": 1,
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
        },
    },
    layer_parameters=_layer_parameters,
    problems=_problems,
)
