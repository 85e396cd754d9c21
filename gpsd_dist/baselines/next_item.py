"""Ranks next items by popularity, in the way a pretrained model is ranked, which has to beat it.

Shape letters: N events, V rows of the item table, C candidates, P positive candidates (queries), Q queries of one time.
"""

import collections.abc
import dataclasses
import logging
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from gpsd_dist import schema
from gpsd_dist.baselines.rows import pretrain_counts, read_batches
from gpsd_dist.metrics.classification import SECONDS_PER_DAY
from gpsd_dist.metrics.ranking import Excluded, RankingSums, rank_targets

log = logging.getLogger(__name__)


def rank_by_popularity(
    data_dir: str | os.PathLike,
    manifest: schema.Manifest,
    split: str,
    rank_cut: int | None = None,
    max_history_length: int | None = None,
    window_days: float | None = None,
) -> dict[str, float | int]:
    """Ranks every item by its number of events; returns hr@K, ndcg@K, mrr and rows.

    Events are those of the `pretrain` histories. With `window_days` they are those of all splits that lie strictly
    before the request and at most so many days back: what a running counter knows at that time.

    Targets are the positives of the first task, as for a pretrained model. They compete with all items but those in the
    request's history: its last `max_history_length` events, which a model with this option sees, or, for None, all
    stored ones. Ties count against the target. ValueError for a window where no event has a time.
    """
    events = None if window_days is None else _read_events(data_dir, manifest)
    counts_V = np.zeros(0) if events else pretrain_counts(data_dir, manifest, manifest.feature(manifest.item_feature))
    sums = RankingSums()
    for queries in _queries(data_dir, manifest, split, with_times=events is not None):
        for of_one_time in queries.by_time() if events else [queries]:
            if events and window_days is not None:
                counts_V = events.counts(int(of_one_time.time_s_P[0]), window_days)
            excluded = _excluded(of_one_time.history_P, max_history_length)
            target_P = torch.from_numpy(of_one_time.target_P)
            query_P1, score_V1 = torch.ones(len(target_P), 1), torch.log1p(torch.from_numpy(counts_V).float())[:, None]
            sums.update(rank_targets(query_P1, score_V1, target_P, excluded=excluded, rank_cut=rank_cut), target_P)
    return sums.metrics()


@dataclasses.dataclass(frozen=True)
class _Queries:
    """Holds positive candidates, each with the time and the history of its request."""

    user_hash_P: np.ndarray  # int64
    time_s_P: np.ndarray  # int64
    target_P: np.ndarray  # int64, table index
    history_P: pa.ListArray

    def by_time(self) -> collections.abc.Iterator["_Queries"]:
        """Yields the queries of one time after the other."""
        order_P = np.argsort(self.time_s_P, kind="stable")
        starts = np.flatnonzero(np.diff(self.time_s_P[order_P], prepend=np.nan))
        for place_Q in np.split(order_P, starts[1:]) if len(order_P) else ():
            history_Q = self.history_P.take(pa.array(place_Q))
            yield _Queries(self.user_hash_P[place_Q], self.time_s_P[place_Q], self.target_P[place_Q], history_Q)


def _queries(
    data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, *, with_times: bool
) -> collections.abc.Iterator[_Queries]:
    """Reads the positives of the first task; user and time are 0 unless they are asked for."""
    name, label = manifest.item_feature, f"label.{manifest.tasks[0].name}"
    columns = [f"history.{name}", f"candidate.{name}", label]
    scalars = ["user_hash", "request_time_s"] if with_times else []
    for batch in read_batches(data_dir, manifest, split, [*columns, *scalars]):
        history, candidate, labels = (batch[column] for column in columns)
        if not pc.list_value_length(candidate).equals(pc.list_value_length(labels)):
            raise ValueError(f"columns {columns[1]!r} and {label!r} of {split!r} do not hold one value per candidate")
        is_positive_C = pc.list_flatten(labels).to_numpy(zero_copy_only=False) == 1
        request_P = pc.list_parent_indices(candidate).to_numpy()[is_positive_C]
        target_P = pc.list_flatten(candidate).to_numpy()[is_positive_C]
        user_hash_P = time_s_P = np.zeros(len(target_P), np.int64)
        if with_times:
            user_hash_P, time_s_P = (batch[scalar].to_numpy()[request_P] for scalar in scalars)
        yield _Queries(user_hash_P, time_s_P, target_P, history.take(request_P))


@dataclasses.dataclass(frozen=True)
class _Events:
    """Holds what happened in the log, sorted by time."""

    time_s_N: np.ndarray
    item_N: np.ndarray
    num_rows: int  # of the item table

    def counts(self, time_s: int, window_days: float) -> np.ndarray:
        """Counts the events of each item at most `window_days` before `time_s`, which is not counted: int64 [V]."""
        first, end = np.searchsorted(self.time_s_N, (time_s - window_days * SECONDS_PER_DAY, time_s))
        return np.bincount(self.item_N[first:end], minlength=self.num_rows)


def _read_events(data_dir: str | os.PathLike, manifest: schema.Manifest) -> _Events:
    """Reads histories and positives of all splits; an event in several of them (user, item, time) counts once."""
    name, parts, num_untimed = manifest.item_feature, [], 0
    for split in manifest.splits:
        if not split.num_rows:  # `valid` of data that were built with --no_valid
            continue
        columns = [f"history.{name}", "history.time_s", "user_hash"]
        for batch in read_batches(data_dir, manifest, split.name, columns):
            time_s = pc.list_flatten(batch["history.time_s"])
            item_N = pc.list_flatten(batch[columns[0]]).to_numpy(zero_copy_only=False)
            user_hash_N = batch["user_hash"].to_numpy()[pc.list_parent_indices(batch[columns[0]]).to_numpy()]
            is_timed_N = pc.is_valid(time_s).to_numpy(zero_copy_only=False)
            time_s_N = pc.fill_null(time_s, 0).to_numpy(zero_copy_only=False)
            num_untimed += int((~is_timed_N).sum())
            parts.append(np.stack([time_s_N, user_hash_N, item_N])[:, is_timed_N])
        if split.name != "pretrain":
            for queries in _queries(data_dir, manifest, split.name, with_times=True):
                parts.append(np.stack([queries.time_s_P, queries.user_hash_P, queries.target_P]))
    if not any(part.shape[1] for part in parts):
        raise ValueError(f"--window_days needs the time of events, but {data_dir} has none; leave the option out")
    events_3N = np.unique(np.concatenate(parts, axis=1), axis=1)
    if num_untimed:
        log.warning("%d tokens of the histories have no time; windows are counted without them", num_untimed)
    return _Events(events_3N[0], events_3N[2], manifest.table(manifest.feature(name).table).num_rows)


def _excluded(history_P: pa.ListArray, max_length: int | None) -> Excluded:
    """Collects the last `max_length` items of every query's history."""
    length_P = pc.list_value_length(history_P).to_numpy()
    item_N = pc.list_flatten(history_P).to_numpy(zero_copy_only=False)
    if max_length is not None:
        from_end_N = np.repeat(length_P.cumsum(), length_P) - np.arange(len(item_N))  # 1: the most recent one
        item_N, length_P = item_N[from_end_N <= max_length], np.minimum(length_P, max_length)
    offsets_P1 = np.concatenate([[0], length_P.cumsum()])
    return Excluded.from_offsets(torch.from_numpy(item_N.copy()), torch.from_numpy(offsets_P1))
