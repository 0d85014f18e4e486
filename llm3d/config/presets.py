"""Shapes of models by name: published LLaMAs and a few small ones.

Names of the fields are those of `llm3d.config.sections.ModelConfig`; what a preset leaves out has that class's
default. The three small shapes have no vocabulary of their own: it comes from `data.tokenizer`, or from
`model.vocab_size`.
"""

from __future__ import annotations

from typing import Any

Shape = dict[str, Any]

LLAMA_1: Shape = {
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_2: Shape = LLAMA_1 | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA_3: Shape = {
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}


def long_context(factor: float) -> Shape:
    """What Llama 3.1 and 3.2 add to Llama 3: 131,072 positions, the slow rotations stretched by `factor`."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LLAMA_3 | {"max_position_embeddings": 131_072, "rope_scaling": scaling}


def shape(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> Shape:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


PRESETS: dict[str, Shape] = {
    # For tests and two CPU cores; the name gives the size with 2,000, 16,000 and 32,000 tokens.
    "llama-tiny": shape(128, 352, 4, 4) | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-20m": shape(384, 1024, 8, 8) | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-160m": shape(768, 3072, 12, 12),
    # Llama 3.2 1B
    "llama-1b": long_context(32.0) | shape(2048, 8192, 16, 32) | {"tie_word_embeddings": True},
    # LLaMA, Touvron et al., February 2023
    "llama-7b": LLAMA_1 | shape(4096, 11_008, 32, 32),
    "llama-13b": LLAMA_1 | shape(5120, 13_824, 40, 40),
    "llama-33b": LLAMA_1 | shape(6656, 17_920, 60, 52),
    "llama-65b": LLAMA_1 | shape(8192, 22_016, 80, 64),
    # Llama 2, Touvron et al., July 2023
    "llama-2-7b": LLAMA_2 | shape(4096, 11_008, 32, 32),
    "llama-2-13b": LLAMA_2 | shape(5120, 13_824, 40, 40),
    "llama-2-70b": LLAMA_2 | shape(8192, 28_672, 80, 64) | {"num_key_value_heads": 8},
    # The Llama 3 herd, Grattafiori et al., 2024
    "llama-3-8b": LLAMA_3 | shape(4096, 14_336, 32, 32),
    "llama-3-70b": LLAMA_3 | shape(8192, 28_672, 80, 64),
    "llama-3.1-8b": long_context(8.0) | shape(4096, 14_336, 32, 32),
    "llama-3.1-70b": long_context(8.0) | shape(8192, 28_672, 80, 64),
    "llama-3.1-405b": long_context(8.0) | shape(16_384, 53_248, 126, 128),
}
