"""Models, and requests that differ in all that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llm3d.generate.cache import BLOCK_SIZE
from llm3d.generate.engine import Generator, Reply
from llm3d.generate.sampling import Sampling
from llm3d.generate.scheduler import Request

ENDS = list(range(0, 131, 9))  # tokens that end a reply, of which any model says some
SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-1": {"num_key_value_heads": 8},
    "llama-2": {"num_key_value_heads": 2},
    "llama-3": {
        "num_key_value_heads": 4,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
        "vocab_size": 149,
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True},
}


def prompts(count: int = 32) -> list[list[int]]:
    """Of mixed lengths, among them whole numbers of the cache's blocks and one more or less."""
    generator = torch.Generator().manual_seed(2)
    lengths = [1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE]
    lengths += torch.randint(1, 60, (32,), generator=generator).tolist()
    return [torch.randint(0, 131, (length,), generator=generator).tolist() for length in lengths[:count]]


class Call(NamedTuple):
    """Of Generator.generate."""

    requests: Sequence[Request]
    max_sequences: int
    cache_bytes: int | None = None


def told_as_written(generator: Generator, call: Call) -> list[list[Reply]]:
    told: dict[tuple[int, int], list[int]] = {}
    replies = generator.generate(
        *call, lambda request, reply, token: told.setdefault((request, reply), []).append(token)
    )
    for number, several in enumerate(replies):
        for reply, found in enumerate(several):
            assert told[number, reply] == found.tokens, "each token is told once, in order"
    return replies


def ends(tokens: Sequence[int]) -> bool:
    return tokens[-1] in ENDS


def drawn(count: int = 12, num_replies: int = 1) -> list[Request]:
    """Requests that differ in all that they ask for."""
    samplings = [
        Sampling(),
        Sampling(temperature=0.7, top_k=20),
        Sampling(top_p=0.9, repetition_penalty=1.2),
        Sampling(temperature=1.3, min_p=0.1),
        Sampling(temperature=0),
    ]
    return [
        Request(prompt, 5 + i % 9, ends, samplings[i % 5], num_replies, seed=i)
        for i, prompt in enumerate(prompts(count))
    ]
