"""Ranks next items by popularity, in the way a pretrained model is ranked, which has to beat it."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from gpsd_dist import schema
from gpsd_dist.baselines.rows import pretrain_counts, read_batches
from gpsd_dist.metrics.ranking import Excluded, RankingSums, rank_targets


def rank_by_popularity(
    data_dir: str | os.PathLike,
    manifest: schema.Manifest,
    split: str,
    rank_cut: int | None = None,
    max_history_length: int | None = None,
) -> dict[str, float | int]:
    """Ranks every item by its number of events in the `pretrain` histories; returns hr@K, ndcg@K, mrr and rows.

    Targets are the positives of the first task, as for a pretrained model. They compete with all items but those in the
    request's history: its last `max_history_length` events, which a model with this option sees, or, for None, all
    stored ones. Ties count against the target.
    """
    name, label = manifest.item_feature, f"label.{manifest.tasks[0].name}"
    counts_V = torch.from_numpy(pretrain_counts(data_dir, manifest, manifest.feature(name)))
    score_V1 = torch.log1p(counts_V.float())[:, None]
    columns = [f"history.{name}", f"candidate.{name}", label]
    sums = RankingSums()
    for batch in read_batches(data_dir, manifest, split, columns):
        history, candidate, labels = (batch[column] for column in columns)
        if not pc.list_value_length(candidate).equals(pc.list_value_length(labels)):
            raise ValueError(f"columns {columns[1]!r} and {label!r} of {split!r} do not hold one value per candidate")
        is_positive_C = pc.list_flatten(labels).to_numpy(zero_copy_only=False) == 1
        request_P = pc.list_parent_indices(candidate).to_numpy()[is_positive_C]
        target_P = torch.from_numpy(pc.list_flatten(candidate).to_numpy()[is_positive_C])
        excluded = _excluded(history.take(request_P), max_history_length)
        query_P1 = torch.ones(len(target_P), 1)
        sums.update(rank_targets(query_P1, score_V1, target_P, excluded=excluded, rank_cut=rank_cut), target_P)
    return sums.metrics()


def _excluded(history_P: pa.ListArray, max_length: int | None) -> Excluded:
    """Collects the last `max_length` items of every query's history."""
    length_P = pc.list_value_length(history_P).to_numpy()
    item_N = pc.list_flatten(history_P).to_numpy(zero_copy_only=False)
    if max_length is not None:
        from_end_N = np.repeat(length_P.cumsum(), length_P) - np.arange(len(item_N))  # 1: the most recent one
        item_N, length_P = item_N[from_end_N <= max_length], np.minimum(length_P, max_length)
    offsets_P1 = np.concatenate([[0], length_P.cumsum()])
    return Excluded.from_offsets(torch.from_numpy(item_N.copy()), torch.from_numpy(offsets_P1))
