"""Draws negatives for next-item targets. A sampler is a function (random, shape, limit) -> int64 ids of that shape.

Negatives are drawn while batches are made, and not in the step, so that their rows are prefetched with all others.
"""

import numpy as np

from gpsd_dist.schema import NUM_RESERVED_ROWS, Manifest

_DRAW_LIMIT = 1 << 62  # of the random numbers that become rows of a managed table


def item_limit(manifest: Manifest) -> int:
    """Returns the end of the range of ids to draw from: all rows of the item table, also where its ids are hashed.

    Which ids a managed table holds is known in the step only, so there the numbers become rows later.
    """
    table = manifest.feature(manifest.item_feature).table
    is_managed = manifest.unbounded.get(table) == "managed"
    return _DRAW_LIMIT if is_managed else manifest.table(table).num_rows


def uniform(random: np.random.Generator, shape: tuple[int, int], limit: int) -> np.ndarray:
    """Draws known items uniformly with replacement: int64 [G, N] of the G sets of N negatives in `shape`."""
    return random.integers(NUM_RESERVED_ROWS, limit, shape)
