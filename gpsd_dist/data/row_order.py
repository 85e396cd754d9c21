"""Computes which row belongs to which batch: arithmetic on row numbers, no files, no ranks.

One epoch of a split with N rows, all of it a function of (seed, epoch) and of the data alone:

1. the row groups are permuted; their rows, one group after the other, are the *sequence* (positions 0 .. N-1);
2. the sequence is cut into V contiguous *data shards* whose sizes differ by at most one row, or, where batches are
   counted in tokens, whose tokens differ by less than two rows;
3. inside a shard, *windows* of `window_rows` rows are permuted;
4. batch b of S takes the next rows of every shard, such that each shard ends exactly with batch S-1.

Whoever reads a shard therefore reads the same rows in the same batches, however many ranks share the V shards.
Shape letters: G row groups of the split, R rows of one window or shard.
"""

import dataclasses
import functools
import typing

import numpy as np

_GROUP_STREAM = 0  # streams 1 .. V belong to the windows of shard 0 .. V-1


def random_order(num: int, seed: int, epoch: int, stream: int, block: int) -> np.ndarray:
    """Permutes range(`num`): int64, a function of the five arguments only.

    Sorts raw Philox words instead of calling `Generator.permutation`: numpy guarantees the bit stream of a bit
    generator over its versions, but not the algorithms of `Generator`, and a resumed run must find the same order.
    """
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, block])
    return np.argsort(bits.random_raw(num), kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)
class EpochOrder:
    """Orders all rows of a split in one epoch."""

    group_rows_G: np.ndarray  # int64 [G]: rows of every row group, in file order
    epoch: int
    num_data_shards: int
    window_rows: int
    seed: int
    shuffle: bool  # False: file order, V contiguous ranges
    group_weight_G: np.ndarray | None = None
    """int64 [G]: weight of every row group in file order; shards get equal weight. None: equal rows."""
    row_weights: typing.Callable[[int], np.ndarray] | None = None
    """Row group -> integers >= 1, the weights of its rows; asked only for groups that a shard begins in."""

    @functools.cached_property
    def group_G(self) -> np.ndarray:
        """Lists the row groups in reading order: int64 [G]."""
        if not self.shuffle:
            return np.arange(len(self.group_rows_G))
        return random_order(len(self.group_rows_G), self.seed, self.epoch, _GROUP_STREAM, 0)

    @functools.cached_property
    def _group_end_G(self) -> np.ndarray:
        """Lists the sequence position behind each group in reading order: int64 [G]."""
        return np.cumsum(self.group_rows_G[self.group_G])

    @functools.cached_property
    def num_rows(self) -> int:
        """Counts the rows of the split (N)."""
        return int(self._group_end_G[-1])

    @functools.cached_property
    def _shard_start_V(self) -> np.ndarray:
        """Lists the sequence position of the first row of every shard, and N: int64 [V + 1]."""
        shards = np.arange(self.num_data_shards + 1, dtype=np.int64)
        if self.group_weight_G is None:
            rows, extra = divmod(self.num_rows, self.num_data_shards)
            return shards * rows + np.minimum(shards, extra)
        assert self.row_weights is not None
        end_G = np.cumsum(self.group_weight_G[self.group_G])
        first_row_G = self._group_end_G - self.group_rows_G[self.group_G]
        starts = [0]
        for wanted in shards[1:-1] * int(end_G[-1]) // self.num_data_shards:
            index = int(np.searchsorted(end_G, wanted, side="right"))
            group = int(self.group_G[index])
            weight_before = int(end_G[index] - self.group_weight_G[group])
            rows = np.searchsorted(np.cumsum(self.row_weights(group)), wanted - weight_before, side="right")
            starts.append(int(first_row_G[index] + rows))
        return np.array([*starts, self.num_rows], np.int64)

    def shard_rows(self, shard: int) -> int:
        """Counts the rows of one data shard."""
        return self.shard_start(shard + 1) - self.shard_start(shard)

    def shard_start(self, shard: int) -> int:
        """Returns the sequence position of the first row of a shard; of shard V, behind the last one: N."""
        return int(self._shard_start_V[shard])

    def _first_window_rows(self, shard: int) -> int:
        # Staggered: with equal first windows all shards would decode their next window in the same step.
        return -(-self.window_rows * (shard + 1) // self.num_data_shards)

    def window_at(self, shard: int, position: int) -> int:
        """Returns the number of the window that holds the shard-relative `position`."""
        first = self._first_window_rows(shard)
        return 0 if position < first else 1 + (position - first) // self.window_rows

    def window_range(self, shard: int, window: int) -> tuple[int, int]:
        """Returns the shard-relative range [from, to) of a window."""
        end = self._first_window_rows(shard) + window * self.window_rows
        start = 0 if window == 0 else end - self.window_rows
        return start, min(end, self.shard_rows(shard))

    def window_order(self, shard: int, window: int) -> np.ndarray | None:
        """Orders the rows of a window, relative to its start: int64 [R]; None: as they stand."""
        if not self.shuffle:
            return None
        start, end = self.window_range(shard, window)
        return random_order(end - start, self.seed, self.epoch, shard + 1, window)

    def group_slices(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Yields (row group, first row in it, number of rows) for the sequence positions [start, end)."""
        slices = []
        index = int(np.searchsorted(self._group_end_G, start, side="right"))
        while start < end:
            group = int(self.group_G[index])
            stop = int(self._group_end_G[index])
            first_row = start - (stop - int(self.group_rows_G[group]))
            slices.append((group, first_row, min(stop, end) - start))
            start, index = stop, index + 1
        return slices


def cut_by_rows(order: EpochOrder, shard: int, step: int, num_steps: int) -> int:
    """Returns the shard-relative position of the first row of batch `step`.

    Batch b holds the global rows [b*N//S, (b+1)*N//S) dealt to the shards in turn, so that it has N/S rows rounded
    down or up, never more than the size that S was computed from.
    """
    global_rows = step * order.num_rows // num_steps
    return (global_rows + order.num_data_shards - 1 - shard) // order.num_data_shards


def cuts_by_weight(weight_R: np.ndarray, num_steps: int) -> np.ndarray:
    """Cuts a shard into batches of 1/S of its weight: the first row of each, int64 [S + 1].

    `weight_R`: integers >= 1 in the order the rows are used. Row i is in batch b if the weight before it lies in
    [b*w/S, (b+1)*w/S), so a batch differs from w/S by less than one row.
    """
    end_R = np.cumsum(weight_R, dtype=np.int64)
    total = int(end_R[-1]) if len(end_R) else 0
    assert total * num_steps < 2**63, (total, num_steps)
    threshold_S = -(-np.arange(num_steps + 1, dtype=np.int64) * total // num_steps)
    return np.searchsorted(end_R - weight_R, threshold_S, side="left")
