"""What the CUDA kernel of the rotary positions computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels import backend
from llm3d.kernels.rope import inverse_frequencies, rope_tables, rotate_
from tests.csrc.conftest import Ops
from tests.csrc.placing import DTYPES, PLACES, placed
from tests.kernels.exactness import assert_close, assert_exact, randn

# Lengths of sequences, so that blocks of tokens begin and end anywhere; heads; head_dim.
SHAPES = [
    ([0], 3, 16),
    ([1], 1, 2),
    ([5, 1, 0, 8], 3, 10),
    ([3, 6], 5, 64),
    ([1] * 9 + [2], 2, 128),
    ([2], 70, 30),
]


def tables(lengths: list[int], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    return *rope_tables(max(lengths) + 1, inverse_frequencies(head_dim, 100.0)), positions


def rotated(ops: Ops, x: Tensor, place: str, *arguments: Tensor, inverse: bool = False) -> Tensor:
    x = placed(x, place)
    ops.rope_(x, *arguments, inverse)
    return x.clone()


def reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    x = x.clone()
    with backend.using("reference"):
        rotate_(x, cos.to(x.dtype), sin.to(x.dtype), positions, inverse)
    return x


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope(
    cuda: Ops, shape: tuple[list[int], int, int], dtype: torch.dtype, place: str, inverse: bool
) -> None:
    lengths, heads, head_dim = shape
    exact, arguments = randn(sum(lengths), heads, head_dim), tables(lengths, head_dim)
    x = exact.to(dtype)
    ours = rotated(cuda, x, place, *arguments, inverse=inverse)
    assert torch.equal(rotated(cuda, x, place, *arguments, inverse=inverse), ours)
    assert_exact(ours, reference(x, *arguments, inverse), reference(exact, *arguments, inverse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_is_that_of_the_cpu(cuda: Ops, native: Ops, dtype: torch.dtype) -> None:
    x, arguments = randn(13, 3, 24).to(dtype), tables([6, 7], 24)
    cpu = rotated(native, x, "contiguous", *arguments)
    assert_close(rotated(cuda, x, "contiguous", *arguments), cpu.double(), max(2e-6, torch.finfo(dtype).eps))


def test_tables_need_no_more_than_sixteen_bytes_of_alignment(cuda: Ops) -> None:
    x, (cos, sin, positions) = randn(7, 3, 64).bfloat16(), tables([7], 64)
    expected = rotated(cuda, x, "contiguous", cos, sin, positions)
    for before in (4, 8, 12):
        shifted = (torch.cat([t.new_zeros(before), t.flatten()])[before:].view(t.shape) for t in (cos, sin))
        assert torch.equal(rotated(cuda, x, "contiguous", *shifted, positions), expected)


def test_only_the_heads_that_are_given_turn(cuda: Ops) -> None:
    qkv, arguments = randn(7, 5, 16).float(), tables([7], 16)
    expected = qkv.clone()
    expected[:, :3] = rotated(cuda, qkv[:, :3], "contiguous", *arguments)
    cuda.rope_(qkv[:, :3], *arguments, False)
    assert torch.equal(qkv, expected)


def test_tokens_at_positions_without_an_angle_stay_as_they_are(cuda: Ops) -> None:
    """Where a CPU raises an error."""
    x, (cos, sin, _) = randn(6, 2, 8).float(), tables([3], 8)
    positions = torch.tensor([0, 1, 2, 0, 1, -1], dtype=torch.int32)
    turned = rotated(cuda, x, "contiguous", cos[:2], sin[:2], positions)
    assert torch.equal(turned[[2, 5]], x[[2, 5]])
    assert not torch.equal(turned[[1, 4]], x[[1, 4]])
