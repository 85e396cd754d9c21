"""Loads batches of a split in a fixed order: every rank gets the same number, and the position can be saved.

`Loader` owns the position; one thread reads Parquet ahead, others gather rows and build batches. Arrow, numpy and torch
release the GIL there, so no processes and no pickling are needed. Which rows form a batch: `row_order.py`.
"""

import collections
import concurrent.futures
import itertools
import logging
import pathlib
import typing
import weakref

import numpy as np
import pyarrow as pa

from gpsd_dist import schema
from gpsd_dist.data import parquet_dataset, row_order
from gpsd_dist.data.epoch_reader import BatchPlan, EpochReader
from gpsd_dist.data.parquet_dataset import BadValue, BatchKey

DEFAULT_NUM_DATA_SHARDS = 16
WINDOW_ROW_GROUPS = 8
MAX_WINDOW_ROWS = 65_536  # about 70 MB at 46 history items in 3 columns; one window per data shard is in memory
MAX_EMPTY_STEPS = 2**20  # batches of less than a row each: legal in a test, a mistake beyond
PLAN_AHEAD_STEPS = 4  # decoding comes in bursts when a shard enters its next window: begin it some steps early

_logger = logging.getLogger(__name__)
T = typing.TypeVar("T")


class Loader(typing.Generic[T]):
    """Iterates over the remaining batches of one epoch; iterating again goes on with the next epoch.

    Every rank gets `steps_per_epoch` batches, every row of the split is in exactly one of them. With shuffling, the
    union over ranks of batch b is the same for every world size that `num_data_shards` allows. A rank without rows in
    a step gets a table with zero rows. Makes no collective calls.

    Memory per rank: num_data_shards / world_size windows of at most `window_rows` rows (plus one row group each, plus
    those that the batches in flight still use), and up to `cache_bytes` of decoded row groups.

    Args (data_dir to world_size say what is read, and who shares it):
        make_batch: turns one table (one chunk per column) into a batch, in a worker thread. May raise `BadValue`.
        columns: columns that `make_batch` needs; None means all.
        num_data_shards: contiguous ranges the shuffled split is cut into, at least `world_size`, best a multiple
            of it. Part of the order. Without shuffling it is `world_size`.
        global_batch_rows: rows of a batch over all ranks, an upper bound.
        global_batch_tokens: instead of rows: history tokens over all ranks (a row without history counts as 1).
            Shards have equal numbers of tokens up to two rows, and each takes its share of a batch up to one row.
        max_history_length: tokens of a history that count at most in `global_batch_tokens`; None: all.
        shuffle: False reads in file order, for evaluation.
        num_threads: threads that run `make_batch`; one more reads files.
        prefetch: finished batches that wait for the consumer.
        disk_cache: folder and bytes for decoded row groups beyond `cache_bytes`; None: decode them again.
        window_rows: rows that are shuffled with each other inside a shard, a part of the order. None: see the code.

    ValueError if there are too few data shards or too many batches, or a file is wrong.
    """

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
        max_history_length: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_threads: int = 1,
        prefetch: int = 2,
        window_rows: int | None = None,
        cache_bytes: int = parquet_dataset.DEFAULT_CACHE_BYTES,
        disk_cache: tuple[pathlib.Path, int] | None = None,
    ):
        if not shuffle:
            num_data_shards = world_size
        _check_shards(rank, world_size, num_data_shards)
        self._split = parquet_dataset.ParquetSplit(
            data_dir, manifest, split, columns, cache_bytes=cache_bytes, disk_cache=disk_cache
        )
        self._make_batch = make_batch
        self._rank = rank
        self._num_data_shards = num_data_shards
        self._shards = range(rank, num_data_shards, world_size)
        self._by_tokens = global_batch_tokens is not None
        self._global_batch = global_batch_tokens or global_batch_rows
        self._shuffle = shuffle
        self._seed = seed
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._longest = max_history_length
        self.num_rows = self._total = self._split.num_rows
        self._group_weight_G: np.ndarray | None = None
        if self._by_tokens:
            self._group_weight_G, self._total = self._split.token_weights(max_history_length)
        self.steps_per_epoch = max(1, -(-self._total // self._global_batch))
        """Batches of an epoch; every rank has as many."""
        if self._by_tokens and self.steps_per_epoch > max(MAX_EMPTY_STEPS, self.num_rows):
            raise ValueError(
                f"global_batch_tokens {global_batch_tokens} cuts the {self._total} history "
                f"tokens of {split!r} into more batches than it has rows ({self.num_rows}); raise it"
            )
        mean_group_rows = self.num_rows / len(self._split.groups)
        self._window_rows = window_rows or min(round(WINDOW_ROW_GROUPS * mean_group_rows), MAX_WINDOW_ROWS)
        self.epoch, self.step = 0, 0  # Place of the next batch
        self._active: weakref.ref[typing.Generator[T, None, None]] | None = None

    def position_after(self, epoch: int, step: int) -> dict[str, int]:
        """Returns the position behind batch `step` of `epoch`, as a part of `state_dict`."""
        is_last = step + 1 >= self.steps_per_epoch
        return {"epoch": epoch + 1, "step": 0} if is_last else {"epoch": epoch, "step": step + 1}

    def close(self) -> None:
        """Ends an iteration under way, joins its threads and closes the files. Iterating again opens them anew."""
        self._stop()
        self._split.close()

    def state_dict(self) -> dict[str, typing.Any]:
        """Returns the position behind the last batch that was handed out (not: prefetched), and what it refers to."""
        return {"epoch": self.epoch, "step": self.step, "order": self._order_facts()}

    def load_state_dict(self, state: dict[str, typing.Any]) -> None:
        """Continues there, at any world size. ValueError: data or options that fix the order have changed."""
        now = self._order_facts()
        then = {"content": now["content"]} | state["order"]  # older positions do not say
        changed = [f"{key} was {then.get(key)!r}, is {value!r}" for key, value in now.items() if then.get(key) != value]
        if changed:
            raise ValueError(
                f"the data position (epoch {state['epoch']}, step {state['step']}) belongs to another order of rows: "
                f"{'; '.join(changed)}; restore these (content: the values in the files), or start a new run from the "
                "weights"
            )
        self._stop()
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def __iter__(self) -> typing.Iterator[T]:
        self._stop()
        batches = self._batches()
        self._active = weakref.ref(batches)  # weak: a `break` in the consumer's loop ends the threads at once
        return batches

    def _stop(self) -> None:
        batches = self._active() if self._active is not None else None
        if batches is not None:
            batches.close()
        self._active = None

    def _batches(self) -> typing.Generator[T, None, None]:
        """Yields the remaining batches of the epoch; its `finally` also runs when the consumer stops early."""
        epoch, first, num_steps = self.epoch, self.step, self.steps_per_epoch
        order = row_order.EpochOrder(
            self._split.group_rows_G,
            epoch,
            self._num_data_shards,
            self._window_rows,
            self._seed,
            self._shuffle,
            self._group_weight_G,
            self._row_weights if self._by_tokens else None,
        )
        reader = EpochReader(self._split, order, self._shards, num_steps, self._by_tokens, self._longest)
        keys = (BatchKey(epoch, step, self._rank) for step in range(first, num_steps))
        plans: collections.deque[concurrent.futures.Future[BatchPlan]] = collections.deque()
        batches: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        in_flight = self._prefetch + self._num_threads - 1
        planner = concurrent.futures.ThreadPoolExecutor(1, "loader-read")
        makers = concurrent.futures.ThreadPoolExecutor(self._num_threads, "loader-make")
        try:
            for step in range(first, num_steps):
                ahead = min(num_steps - step, in_flight + PLAN_AHEAD_STEPS) - len(batches) - len(plans)
                plans.extend(planner.submit(reader.plan, key) for key in itertools.islice(keys, ahead))
                while plans and len(batches) < in_flight:
                    batches.append(makers.submit(self._make, plans.popleft()))
                batch = batches.popleft().result()
                # Before the yield: a state saved in the body of the consumer's loop stands behind this batch.
                self.epoch, self.step = self.position_after(epoch, step).values()
                yield batch
        finally:
            planner.shutdown(wait=False, cancel_futures=True)
            makers.shutdown(wait=True, cancel_futures=True)
            planner.shutdown(wait=True)

    def _row_weights(self, group: int) -> np.ndarray:
        """Weighs the rows of a row group by history length. Runs in the reading thread."""
        return np.clip(self._split.read_history_length(group), 1, self._longest)

    def _make(self, planned: concurrent.futures.Future[BatchPlan]) -> T:
        """Makes one batch, and names file and row of a bad value. Runs in a worker thread."""
        plan = planned.result()
        try:
            batch: typing.Any = self._make_batch(plan.to_table(), plan.key)
        except BadValue as error:
            path, row = self._split.origin(*plan.locate(error.row_in_batch))
            raise ValueError(
                f"{path}, row {row} (from 0), column {error.column!r}: {error.problem}; correct the row, or build the "
                "data set again if it is older than the manifest"
            ) from error
        return batch

    def _order_facts(self) -> dict[str, typing.Any]:
        return {
            "split": self._split.split.name,
            "rows": self.num_rows,
            "files": self._split.fingerprint(),
            "content": self._split.content,
            "num_data_shards": self._num_data_shards,
            "window_rows": self._window_rows,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "batch_by": "tokens" if self._by_tokens else "rows",
            "global_batch": self._global_batch,
        } | ({"shards_by": "tokens", "tokens": self._total} if self._by_tokens else {})


def _check_shards(rank: int, world_size: int, num_data_shards: int) -> None:
    if world_size > num_data_shards:
        raise ValueError(
            f"world_size {world_size} is larger than num_data_shards {num_data_shards}, some ranks would have no data; "
            f"set num_data_shards to {world_size} or a multiple of it (--gin.DataConfig.num_data_shards={world_size})"
        )
    if num_data_shards % world_size and rank == 0:
        _logger.warning(
            "%d data shards do not divide over %d ranks: some ranks have larger batches than others; make "
            "num_data_shards a multiple of the world size",
            num_data_shards,
            world_size,
        )
