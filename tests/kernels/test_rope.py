"""Rotary positions: a rotation of each pair, at the published frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm3d.kernels.rope import RopeTables, inverse_frequencies, rope, rope_tables
from tests.kernels.exactness import assert_as_exact_as, assert_close, randn

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}


def published_frequency(i: int, head_dim: int, theta: float, scaling: dict[str, Any] | None) -> float:
    """One frequency at a time, as the Llama 3.1 reference code has it: by its wavelength."""
    frequency = theta ** (-2 * i / head_dim)
    if scaling is None:
        return frequency
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency / factor
    wavelength = 2 * math.pi / frequency
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, LLAMA3 | {"factor": 32.0}])
@pytest.mark.parametrize(("head_dim", "theta"), [(2, 10000.0), (10, 10000.0), (64, 500000.0), (128, 1e6)])
def test_frequencies_are_the_published_ones(head_dim: int, theta: float, scaling: Any) -> None:
    actual = inverse_frequencies(head_dim, theta, scaling)
    exact = [published_frequency(i, head_dim, theta, scaling) for i in range(head_dim // 2)]
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(exact, rel=1e-5)


def test_llama3_scaling_keeps_fast_slows_slow_and_blends_between() -> None:
    plain, scaled = inverse_frequencies(128, 500000.0), inverse_frequencies(128, 500000.0, LLAMA3)
    ratio = (plain / scaled).tolist()
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(8.0)
    assert ratio == sorted(ratio)
    assert any(1.01 < r < 7.9 for r in ratio)


def rotated(qkv: Tensor, positions: Tensor, frequencies: Tensor, num_rotated: int) -> Tensor:
    """Pairs as complex numbers, in fp64."""
    pairs = torch.complex(*qkv.double().chunk(2, dim=-1))
    angles = (positions[:, None].double() * frequencies.double())[:, None]
    turned = pairs[:, :num_rotated] * torch.polar(torch.ones_like(angles), angles)
    whole = torch.cat([turned, pairs[:, num_rotated:]], dim=1)
    return torch.cat([whole.real, whole.imag], dim=-1)


def positions_of(tokens: int) -> Tensor:
    """In sequences of up to 11 tokens, and the first token's elsewhere, as a part of a sequence has it."""
    positions = torch.arange(tokens, dtype=torch.int32) % 11
    positions[0] = 7
    return positions


def ours(qkv: Tensor, frequencies: Tensor, num_rotated: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf, tables = qkv.clone().requires_grad_(), rope_tables(12, frequencies)
    head_dim = qkv.shape[2]
    out = rope((leaf * 1).flatten(1).clone(), head_dim, *tables, positions_of(len(qkv)), num_rotated)
    out = out.unflatten(1, (-1, head_dim))
    return out.detach(), torch.autograd.grad(out, leaf, grad.clone())[0]


SHAPES = [(1, 1, 1, 2), (5, 3, 2, 4), (13, 7, 5, 10), (31, 6, 4, 64)]  # tokens, heads, rotated, head_dim


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_rotates_forth_and_gradients_back(shape: tuple[int, int, int, int]) -> None:
    tokens, heads, num_rotated, head_dim = shape
    qkv, grad = randn(tokens, heads, head_dim), randn(tokens, heads, head_dim, seed=1)
    positions, frequencies = positions_of(tokens), inverse_frequencies(head_dim, 10000.0)
    out, grad_input = ours(qkv.float(), frequencies, num_rotated, grad.float())
    assert_close(out, rotated(qkv, positions, frequencies, num_rotated))
    assert_close(grad_input, rotated(grad, -positions, frequencies, num_rotated))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_bf16_is_as_exact_as_torch(shape: tuple[int, int, int, int]) -> None:
    tokens, heads, num_rotated, head_dim = shape
    qkv, grad = randn(tokens, heads, head_dim), randn(tokens, heads, head_dim, seed=1)
    positions, frequencies = positions_of(tokens), inverse_frequencies(head_dim, 10000.0)
    out, grad_input = ours(qkv.bfloat16(), frequencies, num_rotated, grad.bfloat16())
    cos, sin = (table.bfloat16()[positions][:, None] for table in rope_tables(12, frequencies))

    def by_torch(x: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x.bfloat16().split([num_rotated, heads - num_rotated], dim=1)
        swapped = torch.cat([-turned[..., head_dim // 2 :], turned[..., : head_dim // 2]], dim=-1)
        turned = turned * cos.repeat(1, 1, 2) + swapped * sin.repeat(1, 1, 2)
        return torch.cat([turned, rest], dim=1)

    exact = rotated(qkv, positions, frequencies, num_rotated)
    assert_as_exact_as(by_torch(qkv, sin), out, exact)
    exact = rotated(grad, -positions, frequencies, num_rotated)
    assert_as_exact_as(by_torch(grad, -sin), grad_input, exact)


def test_tables_are_computed_again_only_for_longer_sequences() -> None:
    frequencies, tables = inverse_frequencies(16, 10000.0), RopeTables()
    first = tables(9, frequencies)
    assert all(map(torch.equal, first, rope_tables(9, frequencies)))
    assert tables(9, frequencies) is first and tables(3, frequencies) is first
    longer = tables(30, frequencies)
    assert all(map(torch.equal, longer, rope_tables(30, frequencies)))
    assert tables(10, frequencies) is longer
    assert tables(10, frequencies.to("meta"))[0].is_meta


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 3000))
def test_scores_depend_on_distance_alone(query_at: int, key_at: int, shift: int) -> None:
    q, k = randn(1, 1, 16).float(), randn(1, 1, 16, seed=1).float()
    frequencies = inverse_frequencies(16, 10000.0)

    tables = rope_tables(8001, frequencies)

    def score(query_at: int, key_at: int) -> float:
        qk = torch.zeros(8001, 2, 16)
        qk[query_at, 0], qk[key_at, 1] = q[0, 0], k[0, 0]
        rope(qk.flatten(1), 16, *tables, torch.arange(8001, dtype=torch.int32), 2)
        return float(qk[query_at, 0] @ qk[key_at, 1])

    assert score(query_at + shift, key_at + shift) == pytest.approx(score(query_at, key_at), abs=5e-3)
