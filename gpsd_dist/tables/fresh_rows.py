"""Initial weights of a row that passes from one id to another: a function of (seed, table, turn, row, column) alone."""

import numpy as np

from gpsd_dist.data.hashing import mix

_TO_UNIT = 2.0**-53


def fresh_rows(seed: int, table: str, turn: int, row_K: np.ndarray, width: int) -> np.ndarray:
    """Standard normal float32 [K, width] for rows int64 [K], by Box-Muller from a counter-based hash.

    `turn`: number of the update that gave the rows away. Independent of which rows are asked for together, so that
    every rank can compute its own.
    """
    key = np.array([seed], np.int64)
    for number in (turn, *table.encode()):
        key = mix(key + number)
    cell_KW = mix(mix(key + row_K)[:, None] + np.arange(width))
    radius_KW = np.sqrt(-2.0 * np.log1p(-_unit(cell_KW)))
    return (radius_KW * np.cos(2.0 * np.pi * _unit(mix(cell_KW + 1)))).astype(np.float32)


def _unit(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits."""
    return ((bits >> 11) & ((1 << 53) - 1)) * _TO_UNIT
