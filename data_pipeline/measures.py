"""Measures a written data set: what `inspect` shows. Reads Parquet in batches; numpy, no engine."""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist import schema

MAX_CANDIDATES = 2_000_000  # of a split; rows lie in the order of a hash, so that the first ones are a fair sample
DAY_S = 86_400
_PRIOR = 20.0  # weight of the overall rate in the rate of a category; untuned


@dataclasses.dataclass
class Sample:
    """Holds the candidates of one split, one element each, and what was counted of its rows."""

    values: dict[str, np.ndarray]
    """Column -> value of each candidate; columns of a request are repeated. No histories, no bags."""
    unknown: dict[str, float]
    """Column -> share of ids that are index 1."""
    history_lengths: np.ndarray
    """Per request."""
    num_rows: int


def sample(root: pathlib.Path, manifest: schema.Manifest, split: schema.Split) -> Sample:
    """Reads the first rows of a split, up to about MAX_CANDIDATES candidates."""
    parts: dict[str, list[np.ndarray]] = {}
    ids: dict[str, np.ndarray] = {}
    lengths, num_candidates = [np.zeros(0, np.int64)], 0
    for batch in (b for file in split.files for b in pq.ParquetFile(root / file).iter_batches(1 << 14)):
        if num_candidates >= MAX_CANDIDATES:
            break
        lengths.append(batch["history_length"].to_numpy())
        counts = np.ones(batch.num_rows, np.int64)
        if split.name != "pretrain":
            counts = pc.list_value_length(batch[f"candidate.{manifest.item_feature}"]).to_numpy()
        num_candidates += int(counts.sum())
        for name in batch.schema.names:
            place, _, feature = name.partition(".")
            if place in schema.PLACES and feature != "time_s" and manifest.feature(feature).kind == "categorical":
                ids[name] = ids.get(name, np.zeros(2)) + _count_unknown(batch[name])
            if place in ("candidate", "label", "context", "sampling") or name in ("user_hash", "request_time_s"):
                flat = _flat(batch[name], counts)
                if flat is not None:
                    parts.setdefault(name, []).append(flat)
    values = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    unknown = {name: float(found[0] / found[1]) if found[1] else 0.0 for name, found in ids.items()}
    history_lengths = np.concatenate(lengths)
    return Sample(values, unknown, history_lengths, len(history_lengths))


def counts_of(found: Sample, task: schema.Task) -> np.ndarray | None:
    """Computes how often each candidate counts: its sample weight, and 1 / rate for a sampled negative of `task`.

    float64 [N]; None where the data set has neither.
    """
    weight, rate = (found.values.get(f"sampling.{name}") for name in schema.SAMPLING)
    if weight is None and rate is None:
        return None
    counts = np.ones(len(found.values[f"label.{task.name}"])) if weight is None else weight.astype(np.float64)
    is_sampled = task.given is None and rate is not None
    return np.where(found.values[f"label.{task.name}"] == 0, counts / rate, counts) if is_sampled else counts


def _count_unknown(column: pa.Array) -> np.ndarray:
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    return np.array([int((column.to_numpy() == schema.UNKNOWN_INDEX).sum()), len(column)], np.float64)


def _flat(column: pa.Array, counts: np.ndarray) -> np.ndarray | None:
    """Returns one value per candidate, as float64 or int64; None for a bag."""
    if not pa.types.is_list(column.type):
        return np.repeat(column.to_numpy(), counts)
    column = pc.list_flatten(column)
    return None if pa.types.is_list(column.type) else column.to_numpy(zero_copy_only=False)


def auc(score_N: np.ndarray, label_N: np.ndarray) -> float:
    """Computes the area under the ROC curve, ties counting half; NaN where there is one class only."""
    _, group_N, size = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(size) - (size - 1) / 2)[group_N]
    num_positive = float(label_N.sum())
    num_negative = len(label_N) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    above = rank_N[label_N == 1].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def single_feature_auc(train: Sample, judged: Sample, column: str, label: str, is_number: bool) -> float:
    """Computes the AUC of one feature alone on `judged`: of a number as it is, of a category by its rate in `train`."""
    y, known = judged.values[label], ~np.isnan(judged.values[label])
    if is_number:
        found = auc(judged.values[column][known], y[known])
        return max(found, 1 - found)
    seen, labels = train.values[column], train.values[label]
    fits = ~np.isnan(labels)
    if not fits.any() or not known.any():
        return float("nan")
    ids, place = np.unique(np.concatenate([seen[fits], judged.values[column][known]]), return_inverse=True)
    place_train, place_judged = place[: int(fits.sum())], place[int(fits.sum()) :]
    rate = labels[fits].mean()
    positives = np.bincount(place_train, labels[fits], len(ids))
    rates = (positives + _PRIOR * rate) / (np.bincount(place_train, minlength=len(ids)) + _PRIOR)
    return auc(rates[place_judged], y[known])


def auc_within_user_days(judged: Sample, column: str, label: str) -> float:
    """Computes the mean AUC of a number inside of each user's day that has both classes; NaN where there is none.

    A count that moves with each label of the day orders that day against (or along) its labels.
    """
    y = judged.values[label]
    known = ~np.isnan(y)
    day = judged.values["request_time_s"][known] // DAY_S
    order = np.lexsort((day, judged.values["user_hash"][known]))
    user, day = judged.values["user_hash"][known][order], day[order]
    score, y = judged.values[column][known][order], y[known][order]
    starts = np.flatnonzero(np.r_[True, (user[1:] != user[:-1]) | (day[1:] != day[:-1])])
    found = [
        auc(s, t) for s, t in zip(np.split(score, starts[1:]), np.split(y, starts[1:]), strict=True) if 0 < t.mean() < 1
    ]
    return float(np.mean(found)) if found else float("nan")


def drift(train: Sample, test: Sample, column: str, is_number: bool) -> float:
    """Measures how far a feature moved: means apart in deviations of train, or the share of other ids (0 ... 1)."""
    before, after = train.values[column], test.values[column]
    if not len(before) or not len(after):
        return float("nan")
    if is_number:
        return float(abs(after.mean() - before.mean()) / (before.std() or 1.0))
    ids, place = np.unique(np.concatenate([before, after]), return_inverse=True)
    shares = [
        np.bincount(part, minlength=len(ids)) / len(part) for part in (place[: len(before)], place[len(before) :])
    ]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)
