"""Baselines without a model: smoothed label rates per item, user and tab, and popularity.

They are the floor a model has to clear. They read the Parquet files of a prepared data set with pyarrow and numpy and
return the same `Predictions` as a model.
"""

import collections.abc
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist import schema
from gpsd_dist.metrics.classification import Predictions

PSEUDO_COUNTS = 20.0  # weight of the global rate in each key's rate; untuned
USER_KEY = "user"
FIT_SPLITS = ("train", "valid")


def evaluate_baseline(
    name: str, data_dir: str | os.PathLike, split: str, tasks: collections.abc.Sequence[str] | None = None
) -> dict[str, dict[str, float | int]]:
    """Metrics per task (all tasks by default) of the baseline `name`, a key of BASELINES, on one split.

    The same keys as `metrics.classification.classification_metrics`. ValueError for an unknown name, split or task.
    """
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}; choose one of {sorted(BASELINES)}")
    manifest = schema.read_manifest(pathlib.Path(data_dir))
    tasks = [task.name for task in manifest.tasks] if tasks is None else tasks
    return {task: BASELINES[name](data_dir, manifest, split, task).metrics() for task in tasks}


def score_rates(
    data_dir: str | os.PathLike,
    manifest: schema.Manifest,
    split: str,
    task: str,
    *,
    keys: collections.abc.Sequence[str] | None = None,
    fit_splits: collections.abc.Sequence[str] | None = None,
    pseudo_counts: float = PSEUDO_COUNTS,
) -> Predictions:
    """Logits of naive Bayes kind: global log-odds plus, for each key, how far its smoothed log-odds are from that.

    A key's rate is (positives + pseudo_counts * global rate) / (rows + pseudo_counts). Rows where the label is not
    observed, or the task's condition is not 1, neither count nor are scored.

    Args:
        data_dir: folder of `manifest`.
        manifest: of the prepared data.
        split: split to score.
        task: label to predict.
        keys: "user" and columns like "candidate.item" or "context.hour" that hold one index per candidate or row. By
            default the item, the user, and candidate.tab where there is one.
        fit_splits: splits to count on; by default `train` and `valid`, or `train` alone for `valid`.
        pseudo_counts: weight of the global rate, > 0.

    Raises ValueError if `split` is also counted on, an argument names nothing, or the fit has not both classes.
    """
    if pseudo_counts <= 0:
        raise ValueError(f"pseudo_counts is {pseudo_counts}, expected a number above 0: an unseen key has no rate else")
    keys = _default_keys(manifest) if keys is None else tuple(keys)
    fit_splits = _fit_splits(split, fit_splits)
    parts = [_read(data_dir, manifest, name, task, keys) for name in fit_splits]
    label_N = np.concatenate([part.label_N for part in parts])
    if not 0 < label_N.sum() < len(label_N):
        raise ValueError(f"task {task!r}: {fit_splits} have {int(label_N.sum())} positives of {len(label_N)} rows")
    global_rate = label_N.mean()
    scored = _read(data_dir, manifest, split, task, keys)
    logit_N = np.full(len(scored.label_N), _log_odds(global_rate))
    for key in keys:
        key_K, index_N = np.unique(np.concatenate([part.keys[key] for part in parts]), return_inverse=True)
        rows_K = np.bincount(index_N, minlength=len(key_K))
        positives_K = np.bincount(index_N, label_N, minlength=len(key_K))
        rate_K = (positives_K + pseudo_counts * global_rate) / (rows_K + pseudo_counts)
        place_N = np.searchsorted(key_K, scored.keys[key]).clip(max=len(key_K) - 1)
        is_seen_N = key_K[place_N] == scored.keys[key]
        logit_N += np.where(is_seen_N, _log_odds(rate_K[place_N]) - _log_odds(global_rate), 0.0)
    return _predictions("logit", logit_N, scored)


def score_popularity(data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, task: str) -> Predictions:
    """log(1 + count) of the candidate item: its events in the `pretrain` histories and its positives in `train`.

    The positives are those of the first task. A plain score: it orders rows and has no probability.
    """
    counts_V = np.zeros(manifest.table(manifest.feature(manifest.item_feature).table).num_rows, np.int64)
    names = {entry.name for entry in manifest.splits}
    if "pretrain" in names:
        column = f"history.{manifest.item_feature}"
        for batch in _batches(data_dir, manifest, "pretrain", [column]):
            item_N = pc.list_flatten(batch[column]).to_numpy(zero_copy_only=False)
            counts_V += np.bincount(item_N, minlength=len(counts_V))
    item_key = f"candidate.{manifest.item_feature}"
    if split != "train":
        train = _read(data_dir, manifest, "train", manifest.tasks[0].name, (item_key,))
        counts_V += np.bincount(train.keys[item_key][train.label_N == 1], minlength=len(counts_V))
    scored = _read(data_dir, manifest, split, task, (item_key,))
    return _predictions("score", np.log1p(counts_V[scored.keys[item_key]]), scored)


BASELINES = {"rates": score_rates, "popularity": score_popularity}


class _Rows:
    """Candidates of one split that count for a task: label uint8 [N], user_hash int64 [N], keys: name -> int64 [N]."""

    def __init__(self, label_N: np.ndarray, user_hash_N: np.ndarray, keys: dict[str, np.ndarray]):
        self.label_N, self.user_hash_N, self.keys = label_N, user_hash_N, keys


def _default_keys(manifest: schema.Manifest) -> tuple[str, ...]:
    has_tab = any(
        feature.name == "tab" and feature.kind == "categorical" and not feature.is_bag
        for feature in manifest.features_in("candidate")
    )
    return (f"candidate.{manifest.item_feature}", USER_KEY, *(["candidate.tab"] if has_tab else []))


def _fit_splits(split: str, fit_splits: collections.abc.Sequence[str] | None) -> tuple[str, ...]:
    if fit_splits is None:
        fit_splits = FIT_SPLITS[:1] if split == "valid" else FIT_SPLITS
    if split in fit_splits:
        raise ValueError(f"split {split!r} cannot be scored with rates counted on itself, fit splits are {fit_splits}")
    return tuple(fit_splits)


def _log_odds(rate):
    return np.log(rate) - np.log1p(-rate)


def _predictions(kind: str, score_N: np.ndarray, rows: _Rows) -> Predictions:
    predictions = Predictions(kind)
    predictions.add(score_N, rows.label_N, rows.user_hash_N)
    return predictions


def _batches(
    data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, columns: list[str]
) -> collections.abc.Iterator[pa.RecordBatch]:
    """Row batches of one split, in file order. ValueError names a file that is missing, broken or of another schema."""
    for name in manifest.split(split).files:
        path = pathlib.Path(data_dir) / name
        try:
            file = pq.ParquetFile(path)
            absent = [column for column in columns if column not in file.schema_arrow.names]
            if absent:
                raise ValueError(f"{path} has no column {absent}, it has {file.schema_arrow.names}")
            yield from file.iter_batches(columns=columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} cannot be read ({error}); build the data set again") from error


def _read(
    data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, task_name: str, keys: tuple[str, ...]
) -> _Rows:
    """Every candidate of a split with an observed label (and the task's condition met), flattened, vectorised."""
    tasks = {task.name: task for task in manifest.tasks}
    if task_name not in tasks:
        raise ValueError(f"the data set has no task {task_name!r}; it has {list(tasks)}")
    label, given = f"label.{task_name}", tasks[task_name].given
    condition = [f"label.{given}"] if given else []
    columns = ["user_hash", label, *condition, *(key for key in keys if key != USER_KEY)]
    parts = []
    for batch in _batches(data_dir, manifest, split, list(dict.fromkeys(columns))):
        num_candidates_B = pc.list_value_length(batch[label]).to_numpy(zero_copy_only=False)
        flat = {name: _per_candidate(batch[name], name, num_candidates_B) for name in dict.fromkeys(columns)}
        is_used_N = ~np.isnan(flat[label])  # null: not observed
        for name in condition:
            is_used_N &= flat[name] == 1
        parts.append([flat[name][is_used_N] for name in columns])
    if not parts:
        raise ValueError(f"split {split!r} of {data_dir} has no rows")
    user_hash_N, label_N, *rest = (np.concatenate(column) for column in zip(*parts))
    values = iter(rest[len(condition) :])
    return _Rows(
        label_N.astype(np.uint8), user_hash_N, {key: user_hash_N if key == USER_KEY else next(values) for key in keys}
    )


def _per_candidate(column: pa.Array, name: str, num_candidates_B: np.ndarray) -> np.ndarray:
    """Values of a column, one per candidate: lists flattened, values of a row repeated. Floats hold null as NaN."""
    if pa.types.is_list(column.type):
        if not np.array_equal(pc.list_value_length(column).to_numpy(zero_copy_only=False), num_candidates_B):
            raise ValueError(f"column {name!r} does not hold one value per candidate; run data_pipeline.validate")
        column = pc.list_flatten(column)
        if pa.types.is_nested(column.type):
            raise ValueError(f"column {name!r} is a bag; a key needs one value per candidate")
        return column.to_numpy(zero_copy_only=False)
    return np.repeat(column.to_numpy(zero_copy_only=False), num_candidates_B)
