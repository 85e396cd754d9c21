"""Remembers what raw ids became: most ids of a request came in others before it.

Spelling, hashing and finding an id takes 1 - 2 us, and some 50 us a column; to remember it takes 0.1 us.
"""

import collections
import itertools

import numpy as np
import pyarrow as pa

_IDS_KEPT = 1 << 16  # of all features; at most 20 MB
_MEAN_BYTES = 64  # columns of longer ids are not remembered: they would only take memory


class SeenIds:
    """Maps raw texts to what a reader made of them, feature by feature. Safe for threads."""

    def __init__(self) -> None:
        self._indices: dict[str, dict[str | None, int]] = collections.defaultdict(dict)
        self._num_ids = 0

    def find(self, feature: str, raw: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        """Finds what ids became, int64 [N], 0 where one was not seen; and the places of those, int64 [M]."""
        known = self._indices[feature]
        index_N = np.fromiter(map(known.get, raw.to_pylist(), itertools.repeat(0)), np.int64, len(raw))
        return index_N, np.flatnonzero(index_N == 0)

    def add(self, feature: str, raw: pa.StringArray, index_N: np.ndarray) -> None:
        """Remembers ids; forgets all others first where there are too many."""
        if raw.nbytes > _MEAN_BYTES * len(raw):
            return
        if self._num_ids + len(raw) > _IDS_KEPT:
            self._indices.clear()
            self._num_ids = 0
        self._indices[feature].update(zip(raw.to_pylist(), index_N.tolist(), strict=True))
        self._num_ids += len(raw)
