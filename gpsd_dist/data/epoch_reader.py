"""Reads the batches of one rank and one epoch: windows are decoded and shuffled here, batches are slices of them.

Windows are made in step order in one thread (`EpochReader.plan`); their slices may be joined (`BatchPlan.to_table`) in
several. Which rows form a batch: `row_order.py`.
"""

import dataclasses

import numpy as np
import pyarrow as pa

from gpsd_dist.data import row_order
from gpsd_dist.data.gather import gather
from gpsd_dist.data.parquet_dataset import BatchKey, ParquetSplit


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
    """Holds the decoded rows of one window of a data shard."""

    number: int
    start: int
    end: int  # Shard-relative range [start, end)
    table: pa.Table  # Rows in the order they are used
    order: np.ndarray | None  # Place of each of them before the shuffle; None: they were not shuffled
    sequence_start: int  # Position in the sequence of the epoch of the row that stood first
    last_group: tuple[int, pa.Table]  # Decoded row group that the next window may begin in


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
    """Lists the rows of one batch: slices of windows that are already decoded."""

    key: BatchKey
    pieces: list[tuple[_Window, int, int]]  # (window, from, to)
    order: row_order.EpochOrder
    schema: pa.Schema

    def to_table(self) -> pa.Table:
        """Joins the rows to one table, one chunk per column; zero rows if this rank has none in this step."""
        slices = [window.table.slice(start, end - start) for window, start, end in self.pieces]
        return gather(slices, None) if slices else self.schema.empty_table()

    def locate(self, row_in_batch: int) -> tuple[int, int]:
        """Returns (row group, row in it) of a row of the batch."""
        for window, start, end in self.pieces:
            if row_in_batch < end - start:
                row = start + row_in_batch
                position = window.sequence_start + (row if window.order is None else int(window.order[row]))
                [(group, row_in_group, _)] = self.order.group_slices(position, position + 1)
                return group, row_in_group
            row_in_batch -= end - start
        raise IndexError(f"the batch has no row {row_in_batch} more")


@dataclasses.dataclass(eq=False)
class EpochReader:
    """Plans the batches of one rank in step order; decodes windows when they are first needed.

    Holds one window per data shard of the rank, and the row group that the window ends in. Runs in one thread.
    """

    split: ParquetSplit
    order: row_order.EpochOrder
    shards: range
    num_steps: int
    by_tokens: bool
    longest: int | None = None  # Tokens of a history that count at most, with `by_tokens`

    def __post_init__(self) -> None:
        self._cuts: dict[int, np.ndarray] = {}
        self._held: dict[int, _Window] = {}

    def plan(self, key: BatchKey) -> BatchPlan:
        """Decodes what batch `key` needs. ValueError: a file cannot be decoded."""
        pieces = []
        for shard in self.shards:
            position, end = self._cut(shard, key.step), self._cut(shard, key.step + 1)
            while position < end:
                number, window = self.order.window_at(shard, position), self._held.get(shard)
                if window is None or window.number != number:
                    window = self._held[shard] = self._load(shard, number, window)
                stop = min(end, window.end)
                pieces.append((window, position - window.start, stop - window.start))
                position = stop
        return BatchPlan(key, pieces, self.order, self.split.schema)

    def _cut(self, shard: int, step: int) -> int:
        """Returns the shard-relative position of the first row of batch `step`."""
        if not self.by_tokens:
            return row_order.cut_by_rows(self.order, shard, step, self.num_steps)
        if shard not in self._cuts:
            self._cuts[shard] = row_order.cuts_by_weight(self._weights(shard), self.num_steps)
        return int(self._cuts[shard][step])

    def _weights(self, shard: int) -> np.ndarray:
        """Lists history lengths, cut to 1 ... `longest`, in the order the rows are used: int32 [rows of the shard]."""
        first = self.order.shard_start(shard)
        slices = self.order.group_slices(first, first + self.order.shard_rows(shard))
        lengths = [self.split.read_history_length(group)[start : start + num] for group, start, num in slices]
        weight_R = np.clip(np.concatenate([np.zeros(0, np.int32), *lengths]), 1, self.longest)
        position = 0
        while position < len(weight_R):
            number = self.order.window_at(shard, position)
            start, position = self.order.window_range(shard, number)
            order = self.order.window_order(shard, number)
            if order is not None:
                weight_R[start:position] = weight_R[start:position][order]
        return weight_R

    def _load(self, shard: int, number: int, previous: _Window | None) -> _Window:
        start, end = self.order.window_range(shard, number)
        sequence_start = self.order.shard_start(shard) + start
        kept = dict([previous.last_group]) if previous else {}
        parts = []
        for group, first_row, num in self.order.group_slices(sequence_start, sequence_start + end - start):
            decoded = kept[group] if group in kept else self.split.read_group(group)
            parts.append(decoded.slice(first_row, num))
        order = self.order.window_order(shard, number)
        return _Window(number, start, end, gather(parts, order), order, sequence_start, (group, decoded))
