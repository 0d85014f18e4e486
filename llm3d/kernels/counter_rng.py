"""Random numbers as a pure function of which token and which column they are for.

No generator, no state: every rank that holds a part of [tokens, columns] draws that part alike, whatever the layout and
the packing, and recomputation draws it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0x7FFFFFFF


def keep_mask(keys: Tensor, stream: int, first_column: int, num_columns: int, dropout: float) -> Tensor:
    """bool [tokens, num_columns]: False with probability `dropout`.

    keys: int64 [tokens], one a token.  stream: which of the model's uses of randomness.
    first_column: of the part of all columns that is drawn.
    """
    return _bits(keys, stream, first_column, num_columns) >= int(dropout * (_MASK + 1))


def symmetric_noise(keys: Tensor, stream: int, num_columns: int) -> Tensor:
    """fp32 [tokens, num_columns], uniform in [-1, 1). keys, stream: as for `keep_mask`."""
    return _bits(keys, stream, 0, num_columns).float().mul_(2 / (_MASK + 1)).sub_(1)


def uniform_number(*parts: Tensor) -> Tensor:
    """fp64 multiples of 2^-32 in [0, 1): one for each tuple of whole numbers, int64 tensors of one shape."""
    key = torch.zeros_like(parts[0])
    for part in parts:
        key = _mix64(key ^ _mix64(part))
    return (key >> 32 & 0xFFFFFFFF).double() / 2**32


def _bits(keys: Tensor, stream: int, first_column: int, num_columns: int) -> Tensor:
    """int32 [tokens, num_columns], uniform in [0, 2^31)."""
    columns = torch.arange(first_column, first_column + num_columns, device=keys.device)
    rows = _narrow(_mix64(keys ^ _signed64(stream)))
    return _mix32(rows[:, None] ^ _narrow(_mix64(columns))[None, :]) & _MASK


def _mix64(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea and Flood 2014) on int64, whose products wrap."""
    x = x + _signed64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed64(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser (Appleby 2011) on int32, in place."""
    x ^= x >> 16 & 0xFFFF
    x *= 0x85EBCA6B - (1 << 32)
    x ^= x >> 13 & 0x7FFFF
    x *= 0xC2B2AE35 - (1 << 32)
    return x.bitwise_xor_(x >> 16 & 0xFFFF)


def _narrow(x: Tensor) -> Tensor:
    return (x & 0xFFFFFFFF).to(torch.int32)


def _signed64(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x
