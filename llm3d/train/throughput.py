"""Floating-point operations of a training step, and what share of the hardware's peak they reach.

FLOPs a token: 6 N for the matrix products of forward and backward, N the parameters that take part in them
(all but an untied input embedding), and 6 x layers x heads x head_dim x length for causal attention, where
length is the token's own sequence's, halved for causality. Chowdhery et al. 2022 (PaLM), appendix B, with the
attention halved. Recomputed activations do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm3d.config import ModelConfig
from llm3d.models.batch import Batch
from llm3d.models.heads import HeadName

FORMULA = (
    "6 N + 6 x layers x heads x head_dim x sequence length (causal) FLOPs a token, recomputation not counted"
)

# Dense bf16 peaks in FLOP/s, from NVIDIA's data sheets (SXM parts).
_PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
_PEAK_FP32 = {"A100": 19.5e12, "H100": 67e12, "H200": 67e12, "B200": 75e12}


def step_flops(
    model: ModelConfig, microbatches: Sequence[Batch], num_tokens: float, head: HeadName = "language"
) -> float:
    """FLOPs of forward and backward over microbatches of `num_tokens` tokens together."""
    products = model.num_parameters(head)
    if head == "score" or not model.tie_word_embeddings:
        products -= (model.vocab_size or 0) * model.hidden_size
    pairs = sum(float(batch.cu_seqlens.diff().double().square().sum()) for batch in microbatches)
    width = model.num_attention_heads * model.head_dim
    return 6.0 * products * num_tokens + 6.0 * model.num_hidden_layers * width * pairs


def peak_flops(device: torch.device, compute: str) -> tuple[str, float | None]:
    """The device's name, and its peak in FLOP/s for the precision; None where it is not known (CPUs)."""
    if device.type != "cuda":
        return "cpu", None
    name = torch.cuda.get_device_name(device)
    table = _PEAK_FP32 if compute == "fp32" else _PEAK_BF16
    return name, next((peak for part, peak in table.items() if part in name), None)
