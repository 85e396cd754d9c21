"""Batches of a split in a fixed order: every rank gets the same number, and the position can be saved.

`Loader` owns the position; one thread reads Parquet ahead, others gather rows and build batches. Arrow, numpy and torch
release the GIL there, so no processes and no pickling are needed. Which rows form a batch: `row_order.py`.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import pathlib
import time
import typing

import numpy as np
import pyarrow as pa

from gpsd_dist import schema
from gpsd_dist.data import parquet_dataset, row_order

DEFAULT_NUM_DATA_SHARDS = 16
WINDOW_ROW_GROUPS = 8
MAX_WINDOW_ROWS = 65_536  # about 70 MB at 46 history items in 3 columns; one window per data shard is in memory
PLAN_AHEAD_STEPS = 4  # decoding comes in bursts when a shard enters its next window: begin it some steps early

_logger = logging.getLogger(__name__)
T = typing.TypeVar("T")


@dataclasses.dataclass(frozen=True)
class BatchKey:
    """Names one batch of one rank; seeds whatever is drawn for it (negatives)."""

    epoch: int
    step: int
    """Batch of the epoch, from 0."""
    rank: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
    """Decoded rows of one window of a data shard."""

    number: int
    start: int
    end: int
    """Shard-relative range [start, end)."""
    table: pa.Table
    order: np.ndarray | None
    """Rows of `table` in the order they are used; None: as they stand."""
    sequence_start: int
    """Position of row 0 of `table` in the sequence of the epoch."""
    last_group: tuple[int, pa.Table]
    """Decoded row group that the next window may begin in."""


@dataclasses.dataclass(frozen=True, eq=False)
class _BatchPlan:
    """Rows of one batch: slices of windows that are already decoded."""

    key: BatchKey
    pieces: list[tuple[_Window, int, int]]
    """(window, from, to) in the window's order."""
    order: row_order.EpochOrder
    empty: pa.Table

    def to_table(self) -> pa.Table:
        """The rows as one table with one chunk per column; zero rows if this rank has none in this step."""
        parts = []
        for window, start, end in self.pieces:
            ordered = window.order is None
            parts.append(window.table[start:end] if ordered else window.table.take(pa.array(window.order[start:end])))
        return pa.concat_tables(parts).combine_chunks() if parts else self.empty

    def locate(self, row_in_batch: int) -> tuple[int, int]:
        """(row group, row in it) of a row of the batch."""
        for window, start, end in self.pieces:
            if row_in_batch < end - start:
                row = start + row_in_batch
                position = window.sequence_start + (row if window.order is None else int(window.order[row]))
                [(group, row_in_group, _)] = self.order.group_slices(position, position + 1)
                return group, row_in_group
            row_in_batch -= end - start
        raise IndexError(f"the batch has no row {row_in_batch} more")


class _EpochReader:
    """Plans the batches of one rank in step order; decodes windows when they are first needed.

    Holds one window per data shard of the rank, and the row group that the window ends in. Runs in one thread.
    """

    def __init__(
        self,
        split: parquet_dataset.ParquetSplit,
        order: row_order.EpochOrder,
        shards: range,
        num_steps: int,
        by_tokens: bool,
    ):
        self._split = split
        self._order = order
        self._shards = shards
        self._num_steps = num_steps
        self._by_tokens = by_tokens
        self._cuts: dict[int, np.ndarray] = {}
        self._held: dict[int, _Window] = {}
        self._empty = pa.Table.from_arrays([pa.array([], field.type) for field in split.schema], schema=split.schema)

    def plan(self, key: BatchKey) -> _BatchPlan:
        """Decodes what batch `key` needs. ValueError: a file cannot be decoded."""
        pieces = []
        for shard in self._shards:
            position, end = self._cut(shard, key.step), self._cut(shard, key.step + 1)
            while position < end:
                window = self._window(shard, self._order.window_at(shard, position))
                stop = min(end, window.end)
                pieces.append((window, position - window.start, stop - window.start))
                position = stop
        return _BatchPlan(key, pieces, self._order, self._empty)

    def _cut(self, shard: int, step: int) -> int:
        """Shard-relative position of the first row of batch `step`."""
        if not self._by_tokens:
            return row_order.cut_by_rows(self._order, shard, step, self._num_steps)
        if shard not in self._cuts:
            self._cuts[shard] = row_order.cuts_by_weight(self._weights(shard), self._num_steps)
        return int(self._cuts[shard][step])

    def _weights(self, shard: int) -> np.ndarray:
        """int32 [rows of the shard]: history length, at least 1, in the order the rows are used."""
        first = self._order.shard_start(shard)
        slices = self._order.group_slices(first, first + self._order.shard_rows(shard))
        lengths = [self._split.read_history_length(group)[start : start + num] for group, start, num in slices]
        weight_R = np.maximum(np.concatenate([np.zeros(0, np.int32), *lengths]), 1)
        position = 0
        while position < len(weight_R):
            number = self._order.window_at(shard, position)
            start, position = self._order.window_range(shard, number)
            order = self._order.window_order(shard, number)
            if order is not None:
                weight_R[start:position] = weight_R[start:position][order]
        return weight_R

    def _window(self, shard: int, number: int) -> _Window:
        held = self._held.get(shard)
        if held is None or held.number != number:
            held = self._held[shard] = self._load(shard, number, held)
        return held

    def _load(self, shard: int, number: int, previous: _Window | None) -> _Window:
        start, end = self._order.window_range(shard, number)
        sequence_start = self._order.shard_start(shard) + start
        kept = dict([previous.last_group]) if previous else {}
        parts = []
        for group, first_row, num in self._order.group_slices(sequence_start, sequence_start + end - start):
            decoded = kept[group] if group in kept else self._split.read_group(group)
            parts.append(decoded.slice(first_row, num))
        table = pa.concat_tables(parts).combine_chunks()
        order = self._order.window_order(shard, number)
        return _Window(number, start, end, table, order, sequence_start, (group, decoded))


class Loader(typing.Generic[T]):
    """Iterates over the remaining batches of one epoch; iterating again goes on with the next epoch.

    Every rank gets `steps_per_epoch` batches, every row of the split is in exactly one of them. With shuffling, the
    union over ranks of batch b is the same for every world size that `num_data_shards` allows. A rank without rows in
    a step gets a table with zero rows. Makes no collective calls.

    Memory per rank: num_data_shards / world_size windows of at most `window_rows` rows (plus one row group each, plus
    those that the batches in flight still use), and up to `cache_bytes` of decoded row groups.
    """

    wait_s: float = 0.0
    """Seconds that the consumer has waited for batches, cumulative."""

    def __init__(
        self,
        data_dir: str | pathlib.Path,
        manifest: schema.Manifest,
        split: str,
        *,
        make_batch: typing.Callable[[pa.Table, BatchKey], T],
        columns: typing.Sequence[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_data_shards: int = DEFAULT_NUM_DATA_SHARDS,
        global_batch_rows: int | None = None,
        global_batch_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_threads: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
        window_rows: int | None = None,
        cache_bytes: int = parquet_dataset.DEFAULT_CACHE_BYTES,
    ):
        """Opens and checks the files of the split (footers only).

        Args:
            data_dir: folder of `manifest.json`.
            manifest: what it says.
            split: name of the split.
            make_batch: turns one table (one chunk per column) into a batch, in a worker thread. May raise `BadValue`.
            columns: columns that `make_batch` needs; None means all.
            rank: this rank.
            world_size: ranks that share the split.
            num_data_shards: contiguous ranges the shuffled split is cut into, at least `world_size`, best a multiple
                of it. Part of the order. Without shuffling it is `world_size`.
            global_batch_rows: rows of a batch over all ranks, an upper bound.
            global_batch_tokens: instead of rows: history tokens over all ranks (a row without history counts as 1).
                Each shard takes its share up to one row.
            shuffle: False reads in file order, for evaluation.
            seed: of the order.
            num_threads: threads that run `make_batch`; one more reads files.
            prefetch: finished batches that wait for the consumer.
            pin_memory: calls `batch.pin_memory()` in the worker thread and hands out what it returns.
            window_rows: rows that are shuffled with each other inside a shard. Part of the order. None: those of 8 row
                groups, at most `MAX_WINDOW_ROWS`.
            cache_bytes: bound of decoded row groups that are kept for other shards and the next epoch.

        Raises:
            ValueError: an option or a file is wrong.
        """
        _check_options(locals())
        self._split = parquet_dataset.ParquetSplit(data_dir, manifest, split, columns, cache_bytes=cache_bytes)
        self._make_batch = make_batch
        self._rank = rank
        self._num_data_shards = num_data_shards if shuffle else world_size
        self._shards = range(rank, self._num_data_shards, world_size)
        self._by_tokens = global_batch_tokens is not None
        self._global_batch = global_batch_tokens if self._by_tokens else global_batch_rows
        self._shuffle = shuffle
        self._seed = seed
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        mean_group_rows = self._split.num_rows / len(self._split.groups)
        self._window_rows = window_rows or min(round(WINDOW_ROW_GROUPS * mean_group_rows), MAX_WINDOW_ROWS)
        self._epoch, self._step = 0, 0
        self._active: typing.Generator[T, None, None] | None = None
        if shuffle and num_data_shards % world_size and rank == 0:
            _logger.warning(
                "%d data shards do not divide over %d ranks: the batches of some ranks are larger than those of others; "
                "a multiple of the world size avoids it",
                num_data_shards,
                world_size,
            )

    @property
    def num_rows(self) -> int:
        """Rows of the split, over all ranks."""
        return self._split.num_rows

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        total = self._split.split.num_history_tokens if self._by_tokens else self._split.num_rows
        return max(1, -(-total // self._global_batch))

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self._epoch

    @property
    def step(self) -> int:
        """Number in its epoch of the next batch."""
        return self._step

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch and ends an iteration under way."""
        self.close()
        self._epoch, self._step = epoch, 0

    def close(self) -> None:
        """Ends an iteration under way, joins its threads and closes the files. Iterating again is possible."""
        if self._active is not None:
            self._active.close()
            self._active = None
        self._split.close()

    def state_dict(self) -> dict[str, typing.Any]:
        """Position behind the last batch that was handed out (not: prefetched), and what it refers to."""
        return {"epoch": self._epoch, "step": self._step, "order": self._order_facts()}

    def load_state_dict(self, state: dict[str, typing.Any]) -> None:
        """Continues there, at any world size. ValueError: data or options that fix the order have changed."""
        now = self._order_facts()
        then = state["order"]
        changed = [f"{key} was {then.get(key)!r}, is {value!r}" for key, value in now.items() if then.get(key) != value]
        if changed:
            raise ValueError(
                f"the data position (epoch {state['epoch']}, step {state['step']}) belongs to another order of rows: "
                f"{'; '.join(changed)}; restore these, or start a new run from the weights"
            )
        self.close()
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def __iter__(self) -> typing.Iterator[T]:
        if self._active is not None:
            self._active.close()
        self._active = self._batches()
        return self._active

    def _order_facts(self) -> dict[str, typing.Any]:
        return {
            "split": self._split.split.name,
            "rows": self._split.num_rows,
            "files": self._split.fingerprint(),
            "num_data_shards": self._num_data_shards,
            "window_rows": self._window_rows,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "batch_by": "tokens" if self._by_tokens else "rows",
            "global_batch": self._global_batch,
        }
