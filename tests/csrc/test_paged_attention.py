"""What the CUDA kernels of the paged cache compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.csrc.conftest import Ops
from tests.csrc.placing import DTYPES, PLACES, placed
from tests.kernels.cached import Sequences, sequences, slots_of
from tests.kernels.exactness import assert_close, assert_exact, randn


def decode(ops: Ops, inputs: Sequences, place: str = "contiguous") -> Tensor:
    """The caches have to be contiguous, so they are strided and misaligned, or neither."""
    cache_place = "misaligned" if "misaligned" in place else "contiguous"
    caches = (placed(cache, cache_place) for cache in (inputs.key_cache, inputs.value_cache))
    tables = inputs.block_table, inputs.lengths
    return ops.paged_decode_attention(placed(inputs.q, place), *caches, *tables, inputs.scale)


def assert_dense(cuda: Ops, inputs: Sequences, place: str = "contiguous") -> None:
    ours = decode(cuda, inputs, place)
    assert torch.equal(decode(cuda, inputs, place), ours)
    assert_exact(ours, inputs.dense(ours.dtype), inputs.dense(torch.float64))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_decoded_token_is_dense_attention(
    cuda: Ops, block_size: int, dtype: torch.dtype, place: str
) -> None:
    """Of no tokens, one, those of a tile, one more, and of several tiles."""
    assert_dense(cuda, sequences([0, 1, 128, 129, 400], dtype, block_size=block_size), place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 1), (6, 2), (8, 1), (10, 1), (7, 1)], ids=str)
def test_any_group_of_heads(cuda: Ops, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """One sequence that is split over many blocks, and one that leaves most of them without work."""
    assert_dense(cuda, sequences([700, 9], dtype, heads=heads, head_dim=16, block_size=16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 80, 128, 129, 256])
def test_heads_of_any_size(cuda: Ops, head_dim: int, dtype: torch.dtype) -> None:
    assert_dense(cuda, sequences([150, 3], dtype, heads=(6, 1), head_dim=head_dim))


def test_longer_heads_are_an_error(cuda: Ops) -> None:
    with pytest.raises(RuntimeError, match="head_dim 257"):
        decode(cuda, sequences([3], head_dim=257))


def test_the_result_does_not_depend_on_the_length_of_the_table_by_more_than_rounding(cuda: Ops) -> None:
    inputs = sequences([300], heads=(2, 1), block_size=16)
    expected = decode(cuda, inputs)
    inputs.block_table = torch.nn.functional.pad(inputs.block_table, (0, 100), value=-1)
    assert_close(decode(cuda, inputs), expected.double())


def test_scores_of_any_size(cuda: Ops) -> None:
    assert_dense(cuda, sequences([300, 5], scale=300.0))


def test_nan_in_a_used_key_reaches_its_heads_alone(cuda: Ops) -> None:
    inputs = sequences([200, 200])
    inputs.key_cache.flatten(0, 1)[slots_of(inputs.block_table[1], 200, 3)[4], 0, 0] = torch.nan
    out = decode(cuda, inputs)
    assert out[1, :3].isnan().all()
    assert torch.isfinite(out[0]).all() and torch.isfinite(out[1, 3:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_is_that_of_the_cpu(cuda: Ops, native: Ops, dtype: torch.dtype) -> None:
    inputs = sequences([0, 17, 300], dtype, head_dim=24)
    cpu = decode(native, inputs).double()
    assert_close(decode(cuda, inputs), cpu, max(2e-6, torch.finfo(dtype).eps))


@pytest.mark.parametrize("head_dim", [5, 16])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_appended_is_what_is_read(cuda: Ops, dtype: torch.dtype, place: str, head_dim: int) -> None:
    """The rest of the cache stays. A token whose slot is negative, or beyond the cache, is not stored."""
    k, v = (randn(7, 2, head_dim, seed=seed).to(dtype) for seed in range(2))
    before = [randn(7, 3, 2, head_dim, seed=2 + seed).to(dtype) for seed in range(2)]
    cache_place = "misaligned" if "misaligned" in place else "contiguous"
    caches = [placed(cache, cache_place) for cache in before]
    slots = torch.tensor([13, -1, 0, 20, -7, 21, 7])
    cuda.kv_cache_append_(*caches, placed(k, place), placed(v, place), slots)
    stored = (slots >= 0) & (slots < 21)
    for cache, expected, tokens in zip(caches, before, (k, v), strict=True):
        expected.flatten(0, 1)[slots[stored]] = tokens[stored]
        assert torch.equal(cache, expected)


def test_no_tokens_and_no_sequences(cuda: Ops) -> None:
    assert decode(cuda, sequences([])).shape == (0, 6, 8)
    assert torch.equal(decode(cuda, sequences([0, 0])), torch.zeros(2, 6, 8))
    cache, none = torch.zeros(1, 2, 1, 4), torch.empty(0, 1, 4)
    cuda.kv_cache_append_(cache, cache.clone(), none, none, torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache, torch.zeros(1, 2, 1, 4))
