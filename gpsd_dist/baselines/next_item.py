"""Ranks next items by popularity, in the way a pretrained model is ranked, which has to beat it.

Shape letters: N tokens of histories, V rows of the item table, P positive candidates (queries).
"""

import collections.abc
import dataclasses
import logging
import os
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from gpsd_dist import schema
from gpsd_dist.data.item_events import ItemEvents, positives, read_item_events, window_seconds
from gpsd_dist.data.split_batches import pretrain_counts, read_batches
from gpsd_dist.metrics.ranking import Excluded, Offsets, RankingSums, rank_targets

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
    item, sums = manifest.feature(manifest.item_feature), RankingSums()
    score_V1 = torch.zeros(manifest.table(item.table).num_rows, 1)
    events = None
    if window_days is None:
        score_V1 += torch.from_numpy(pretrain_counts(data_dir, manifest, item)).float().log1p()[:, None]
    else:
        events, num_untimed = read_item_events(data_dir, manifest, [split.name for split in manifest.splits])
        if num_untimed:
            log.warning("%d tokens of the histories have no time; windows are counted without them", num_untimed)
    for queries in _queries(data_dir, manifest, split, with_times=events is not None):
        target_P = torch.from_numpy(queries.target_P)
        excluded = _excluded(queries.history_P, max_history_length)
        offsets = None if events is None else _counts(events, queries, window_seconds(window_days or 0))
        options: dict[str, typing.Any] = {"excluded": excluded, "rank_cut": rank_cut, "offsets": offsets}
        sums.update(rank_targets(torch.ones(len(target_P), 1), score_V1, target_P, **options), target_P)
    return sums.metrics()


def _counts(events: ItemEvents, queries: "_Queries", window: int) -> Offsets:
    """Scores items by their counts before the time of each query."""
    time_s_P, target_P = torch.from_numpy(queries.time_s_P), torch.from_numpy(queries.target_P)
    return Offsets(
        events.count(target_P, time_s_P, window).double(),
        lambda first, stop: events.count_all(torch.arange(first, stop), time_s_P, window).double(),
    )


@dataclasses.dataclass(frozen=True)
class _Queries:
    """Holds positive candidates, each with the time and the history of its request."""

    time_s_P: np.ndarray  # int64
    target_P: np.ndarray  # int64, table index
    history_P: pa.ListArray


def _queries(
    data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, *, with_times: bool
) -> collections.abc.Iterator[_Queries]:
    """Reads the positives of the first task; the time is 0 unless it is asked for."""
    name, label = manifest.item_feature, f"label.{manifest.tasks[0].name}"
    columns = [f"history.{name}", f"candidate.{name}", label]
    scalars = ["request_time_s"] if with_times else []
    for batch in read_batches(data_dir, manifest, split, [*columns, *scalars]):
        request_P, target_P = positives(batch, columns[1], label)
        time_s_P = batch["request_time_s"].to_numpy()[request_P] if with_times else np.zeros(len(target_P), np.int64)
        yield _Queries(time_s_P, target_P, batch[columns[0]].take(pa.array(request_P)))


def _excluded(history_P: pa.ListArray, max_length: int | None) -> Excluded:
    """Collects the last `max_length` items of every query's history."""
    length_P = pc.list_value_length(history_P).to_numpy()
    item_N = pc.list_flatten(history_P).to_numpy(zero_copy_only=False)
    if max_length is not None:
        from_end_N = np.repeat(length_P.cumsum(), length_P) - np.arange(len(item_N))  # 1: the most recent one
        item_N, length_P = item_N[from_end_N <= max_length], np.minimum(length_P, max_length)
    offsets_P1 = np.concatenate([[0], length_P.cumsum()])
    return Excluded.from_offsets(torch.from_numpy(item_N.copy()), torch.from_numpy(offsets_P1))
