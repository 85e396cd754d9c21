"""Hashes a 64-bit id into one of a fixed number of rows: equal in numpy, in torch and for ever.

    mix: x ^= x >>> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >>> 27; x *= 0x94D049BB133111EB; x ^= x >>> 31   (mod 2^64)
    row: 2 + (mix(id) >>> 1) mod (num_rows - 2)

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit words in which every
input bit flips every output bit with a probability near 1/2. Ids 0 (padding) and 1 (unknown) keep their rows.
"""

import typing

import numpy as np
import torch

from gpsd_dist.schema import NUM_RESERVED_ROWS

Ids = typing.TypeVar("Ids", np.ndarray, torch.Tensor)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))  # as signed: int64 products wrap alike


def mix(id_N: Ids) -> Ids:
    """Mixes the bits of ids by SplitMix64's finaliser: int64 [N] -> int64 [N]."""
    x = id_N
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def hashed_rows(id_N: Ids, num_rows: int) -> Ids:
    """Returns table rows int64 [N] for ids int64 [N] (0 padding, 1 unknown, others at least 2)."""
    row_N = NUM_RESERVED_ROWS + _shifted(mix(id_N), 1) % (num_rows - NUM_RESERVED_ROWS)
    is_reserved_N = id_N < NUM_RESERVED_ROWS
    if isinstance(id_N, torch.Tensor):
        return torch.where(is_reserved_N, id_N, row_N)
    return np.where(is_reserved_N, id_N, row_N)


def _shifted(x: Ids, bits: int) -> Ids:
    """Shifts logically: an int64 shift alone would drag the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
