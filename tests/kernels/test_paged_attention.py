"""Attention over a paged cache against fp64 attention over the same tokens laid side by side."""

from __future__ import annotations

import pytest
import torch

from llm3d.kernels.attention import attention
from llm3d.kernels.paged_attention import kv_cache_append_, paged_decode_attention
from tests.kernels.backends import needs_native
from tests.kernels.cached import Sequences, block_tables, sequences, slots_of
from tests.kernels.exactness import assert_as_exact_as, assert_close, error, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HEADS = [(4, 1), (6, 2), (3, 3), (10, 1)]  # query heads, key-value heads


def assert_dense(inputs: Sequences) -> None:
    out, exact = inputs.decode(), inputs.dense(torch.float64)
    assert out.dtype == inputs.q.dtype and out.is_contiguous()
    if out.dtype == torch.float64:
        assert_close(out, exact, tolerance=1e-14)
    elif out.dtype == torch.float32:  # large scores are rounded by more than 2e-6, by PyTorch too
        theirs = error(inputs.dense(out.dtype), exact)
        assert torch.isfinite(out).all()
        assert error(out, exact) <= max(2 * theirs, 2e-6 * float(exact.abs().max()))
    else:
        assert_as_exact_as(inputs.dense(out.dtype), out, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_decoded_token_is_dense_attention(block_size: int, dtype: torch.dtype) -> None:
    """Ragged lengths: none, one, a block's boundary, beyond it, and some that need several tiles of scores."""
    assert_dense(sequences([0, 1, 16, 17, 48, 150], dtype, block_size=block_size))


@pytest.mark.parametrize("head_dim", [1, 5, 64, 80, 129])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_any_heads_of_any_size(heads: tuple[int, int], head_dim: int) -> None:
    assert_dense(sequences([7, 0, 70], heads=heads, head_dim=head_dim))


def test_scores_of_any_size() -> None:
    """Where one score stands far above the others, and where the largest comes last."""
    assert_dense(sequences([200, 5], scale=300.0))
    inputs = sequences([130], heads=(1, 1), block_size=16)
    for token, slot in enumerate(slots_of(inputs.block_table[0], 130, 16).tolist()):
        inputs.k[0][token] = inputs.q[0] * token / 10
        inputs.key_cache.flatten(0, 1)[slot] = inputs.k[0][token]
    assert_dense(inputs)


def test_no_sequences_and_no_tokens() -> None:
    assert sequences([]).decode().shape == (0, 6, 8)
    assert torch.equal(sequences([0, 0]).decode(), torch.zeros(2, 6, 8))


def test_nan_in_a_used_key_reaches_its_heads_alone() -> None:
    inputs = sequences([20, 20])
    inputs.key_cache.flatten(0, 1)[slots_of(inputs.block_table[1], 20, 3)[4], 0, 0] = torch.nan
    out = inputs.decode()
    assert out[1, :3].isnan().all()
    assert torch.isfinite(out[0]).all() and torch.isfinite(out[1, 3:]).all()


def test_strided_queries() -> None:
    inputs = sequences([9, 40])
    expected = inputs.decode()
    packed = torch.randn(2, 11, 8)
    packed[:, 2:8] = inputs.q
    inputs.q = packed[:, 2:8]
    assert torch.equal(inputs.decode(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    inputs = sequences([300, 1, 0, 77], dtype, head_dim=40)
    first = inputs.decode()
    assert all(torch.equal(inputs.decode(), first) for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_appended_is_what_is_read(dtype: torch.dtype) -> None:
    """Through views into a packed qkv. The rest of the cache stays, and a token without a slot is not stored."""
    heads, kv_heads, head_dim, block_size = 4, 2, 5, 3
    qkv = torch.randn(6, heads + 2 * kv_heads, head_dim).to(dtype)
    _, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    caches = [torch.randn(7, block_size, kv_heads, head_dim).to(dtype) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    slots = torch.tensor([13, -1, 0, 20, -7, 7])
    kv_cache_append_(*caches, k, v, slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot // block_size, slot % block_size] = k[token]
            expected[1][slot // block_size, slot % block_size] = v[token]
    assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1])


def test_a_slot_beyond_the_cache_is_an_error() -> None:
    caches = [torch.zeros(2, 3, 1, 4) for _ in range(2)]
    with pytest.raises((RuntimeError, IndexError), match="6"):
        kv_cache_append_(*caches, torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.tensor([5, 6]))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decoding_step_by_step_is_causal_attention(heads: tuple[int, int]) -> None:
    """Token by token for two sequences, the second three tokens shorter, against all tokens at once."""
    lengths, head_dim, block_size = [12, 9], 16, 4
    q = [randn(length, heads[0], head_dim, seed=i).float() for i, length in enumerate(lengths)]
    k = [randn(length, heads[1], head_dim, seed=i + 10).float() for i, length in enumerate(lengths)]
    v = [randn(length, heads[1], head_dim, seed=i + 20).float() for i, length in enumerate(lengths)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = torch.cat([torch.cat(x) for x in (q, k, v)], dim=1)
    whole = attention(qkv, heads[0], cu_seqlens, max(lengths)).split(lengths)
    table, blocks = block_tables(lengths, block_size)
    caches = [torch.full((blocks, block_size, heads[1], head_dim), torch.nan) for _ in range(2)]
    for step in range(max(lengths)):
        running = [i for i, length in enumerate(lengths) if step < length]
        slots = torch.stack([slots_of(table[i], step + 1, block_size)[step] for i in running])
        now = [torch.stack([x[i][step] for i in running]) for x in (q, k, v)]
        kv_cache_append_(*caches, now[1], now[2], slots)
        seen = torch.full((len(running),), step + 1, dtype=torch.int32)
        out = paged_decode_attention(now[0], *caches, table[: len(running)], seen, head_dim**-0.5)
        expected = torch.stack([whole[i][step] for i in running])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_the_ops_declare_what_they_do() -> None:
    """Schema, mutation and the shapes given to tracing, by PyTorch's own check."""
    inputs = sequences([5, 0, 9])
    tables = inputs.block_table, inputs.lengths
    decode = inputs.q, inputs.key_cache.nan_to_num(), inputs.value_cache.nan_to_num(), *tables, 0.5
    torch.library.opcheck(torch.ops.llm3d.paged_decode_attention.default, decode)
    k, v = torch.randn(3, 7, 8).split([3, 2, 2], dim=1)[1:]
    append = torch.zeros(4, 3, 2, 8), torch.zeros(4, 3, 2, 8), k, v, torch.tensor([11, -1, 2])
    torch.library.opcheck(torch.ops.llm3d.kv_cache_append_.default, append)
