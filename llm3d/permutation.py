"""Keyed permutations of ranges, and the keys for them: pure functions, the same on every rank, without memory."""

from typing import TypeVar

import numpy as np

IntOrArray = TypeVar("IntOrArray", int, np.ndarray)

ROUNDS = 8
_MASK = (1 << 64) - 1


def mix(value: IntOrArray) -> IntOrArray:
    """splitmix64's output function (Steele, Lea and Flood 2014), a scattering bijection of 64-bit integers.

    value: int or uint64 array.
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key out of several integers, such as (seed, source, epoch)."""
    key = 0
    for part in parts:
        key = mix(key ^ mix(part & _MASK))
    return key


def permute(index: IntOrArray, size: int, key: int) -> IntOrArray:
    """Where the keyed permutation of range(size) puts `index`.

    index: int, or an integer array (then the result is an int64 array of its shape), each in [0, size).
    A Feistel network on the smallest number of bits that holds `size`, walked until it lands inside (Black
    and Rogaway 2002): fewer than two steps on average, no memory.
    """
    if isinstance(index, np.ndarray):
        return _permute_array(index, size, key)
    assert 0 <= index < size, (index, size)
    bits, keys = (size - 1).bit_length(), _round_keys(key)
    index = _feistel(int(index), bits, keys)
    while index >= size:
        index = _feistel(index, bits, keys)
    return index


def _permute_array(index: np.ndarray, size: int, key: int) -> np.ndarray:
    assert not len(index) or (index.min() >= 0 and index.max() < size)
    bits, keys = (size - 1).bit_length(), _round_keys(key)
    result = _feistel(index.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], bits, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _round_keys(key: int) -> list[int]:
    return [derive_key(key, i) for i in range(ROUNDS)]


def _feistel(value: IntOrArray, bits: int, keys: list[int]) -> IntOrArray:
    """A bijection of [0, 2**bits): each half in turn is xored with a hash of the other."""
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    low, high = value & low_mask, value >> low_bits
    for i, key in enumerate(keys):
        if i % 2:
            low = low ^ (mix(high ^ key) & low_mask)
        else:
            high = high ^ (mix(low ^ key) & high_mask)
    return high << low_bits | low
