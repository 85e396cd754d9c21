"""Scores candidates without a model: by smoothed label rates per item, user and tab, and by popularity.

A model has to beat these baselines. They read the Parquet files of a prepared data set and return `Predictions`, as a
model does.
"""

import collections.abc
import os

import numpy as np
from scipy.special import logit

from gpsd_dist import schema
from gpsd_dist.baselines.rows import USER_KEY, Sampling, predictions, read_rows
from gpsd_dist.data.split_batches import pretrain_counts
from gpsd_dist.metrics.classification import Predictions

PSEUDO_COUNTS = 20.0  # weight of the global rate in each key's rate; untuned


def score_rates(
    data_dir: str | os.PathLike,
    manifest: schema.Manifest,
    split: str,
    task: str,
    *,
    keys: collections.abc.Sequence[str] | None = None,
    is_weighted: bool = False,
) -> Predictions:
    """Adds to the global log-odds, for each key, how far its smoothed log-odds are from them, like naive Bayes.

    A key's rate is (positives + PSEUDO_COUNTS * global rate) / (rows + PSEUDO_COUNTS), counted on `train` and `valid`,
    or on `train` alone if `valid` is scored. A row counts by its sample weight (scaled to a mean of 1), and a negative
    of a sampled log 1 / rate times. `is_weighted`: metrics take sample weights too. Rows where the label is not
    observed, or the task's condition is not 1, are neither counted nor scored. `keys`: "user" and columns like
    "candidate.item" or "context.hour" that hold one index per candidate or row; by default the item, the user, and
    candidate.tab where there is one.

    ValueError if `train` is to be scored, an argument names nothing, or the fit has not both classes.
    """
    keys = _default_keys(manifest) if keys is None else tuple(keys)
    scored_splits = split.split("+")
    if "train" in scored_splits:
        raise ValueError(f"split {split!r} cannot be scored with rates counted on itself; choose valid or test")
    fit_splits = ("train",) if "valid" in scored_splits else ("train", "valid")
    parts = [read_rows(data_dir, manifest, name, task, keys) for name in fit_splits]
    label_N = np.concatenate([part.label_N for part in parts])
    weight_N = Sampling.concatenated([part.sampling for part in parts]).fit_weights()
    positive_N = label_N if weight_N is None else label_N * weight_N
    num_rows = len(label_N) if weight_N is None else weight_N.sum()
    if not 0 < positive_N.sum() < num_rows:
        raise ValueError(f"task {task!r}: {fit_splits} have {positive_N.sum():.6g} positives of {num_rows:.6g} rows")
    global_rate = positive_N.sum() / num_rows
    scored = read_rows(data_dir, manifest, split, task, keys)
    logit_N = np.full(len(scored.label_N), logit(global_rate))
    for key in keys:
        key_K, index_N = np.unique(np.concatenate([part.keys[key] for part in parts]), return_inverse=True)
        rows_K = np.bincount(index_N, weight_N, minlength=len(key_K))
        positives_K = np.bincount(index_N, positive_N, minlength=len(key_K))
        rate_K = (positives_K + PSEUDO_COUNTS * global_rate) / (rows_K + PSEUDO_COUNTS)
        place_N = np.searchsorted(key_K, scored.keys[key]).clip(max=len(key_K) - 1)
        is_seen_N = key_K[place_N] == scored.keys[key]
        logit_N += np.where(is_seen_N, logit(rate_K[place_N]) - logit(global_rate), 0.0)
    return predictions("logit", logit_N, scored, is_weighted)


def score_popularity(
    data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, task: str, *, is_weighted: bool = False
) -> Predictions:
    """Scores a candidate item by log(1 + count): events in the `pretrain` histories plus positives in `train`.

    The positives are those of the first task; they are left out where `train` itself is scored. The score orders rows,
    but is no probability. Sample weights enter the metrics alone, with `is_weighted`.
    """
    counts_V = pretrain_counts(data_dir, manifest, manifest.feature(manifest.item_feature))
    item_key = f"candidate.{manifest.item_feature}"
    if "train" not in split.split("+"):
        train = read_rows(data_dir, manifest, "train", manifest.tasks[0].name, (item_key,))
        counts_V += np.bincount(train.keys[item_key][train.label_N == 1], minlength=len(counts_V))
    scored = read_rows(data_dir, manifest, split, task, (item_key,))
    return predictions("score", np.log1p(counts_V[scored.keys[item_key]]), scored, is_weighted)


def _default_keys(manifest: schema.Manifest) -> tuple[str, ...]:
    has_tab = any(
        feature.name == "tab" and feature.kind == "categorical" and not feature.is_bag
        for feature in manifest.features_in("candidate")
    )
    return (f"candidate.{manifest.item_feature}", USER_KEY, *(["candidate.tab"] if has_tab else []))
