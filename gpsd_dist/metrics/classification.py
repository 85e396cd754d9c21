"""Computes exact classification metrics over all ranks: AUC, GAUC, log loss, normalised entropy, calibration.

Nothing is binned, windowed or dropped. Sums run over sorted rows, so the bits depend neither on the order of the rows
nor on how they are split over ranks.
"""

import collections.abc
import math

import numpy as np
import torch
import torch.distributed as dist

from gpsd_dist.distributed.main_rank import on_main

COUNT_KEYS = ("rows", "gauc_users", "gauc_user_days")
METRIC_KEYS = ("auc", "gauc", "gauc_user_day", "log_loss", "ne", "calibration", *COUNT_KEYS, "label_rate")
"""Keys of what `classification_metrics` returns:

- `auc`: chance that a positive row scores above a negative one, a tie counts half (Mann-Whitney U). NaN without both
  classes.
- `gauc`: AUC within each user, averaged with the number of the user's rows (impressions) as weight, over the
  `gauc_users` users that have both classes (Zhu et al., KDD'17, "Optimized Cost per Click", eq. 14). NaN if none.
- `gauc_user_day`: the same within each user and UTC day, over `gauc_user_days` groups. A score that follows a user's
  rate of clicks moves all rows of one day together. `gauc` compares rows across days, so that this counts, for or
  against the score; `gauc_user_day` does not.
- `log_loss`: mean cross entropy in nats, from logits without rounding.
- `ne`: log_loss over the entropy of the label rate, below 1 is better than a constant (He et al., ADKDD'14, section 3);
  NaN without both classes.
- `calibration`: sum of probabilities over sum of labels; NaN without positives.
- `rows`, `label_rate` (NaN without rows). For kind "score", log_loss, ne and calibration are NaN.
"""
LOSS_KEYS = ("log_loss", "ne")  # a smaller one is better
KINDS = ("logit", "score")  # a score only orders rows: log_loss, ne and calibration are NaN
SECONDS_PER_DAY = 86_400
_MESSAGE_ROWS = 1 << 24  # rows per message when gathering; keeps one message below 128 MiB


class Predictions:
    """Collects scores and labels of one task on this rank, on the CPU: 17 bytes per row.

    A row is its score (float32), label (uint8), user_hash (int64) and the UTC day of its request (int32). With items,
    8 bytes more hold the table index of its candidate. If rows have weights, 4 bytes more hold them (float32).
    """

    def __init__(self, kind: str = "logit", *, with_items: bool = False, with_weights: bool = False):
        """Takes scores of one `kind`: "logit", or "score" (good for ranking metrics only)."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {KINDS}")
        self.kind, self.with_items, self.with_weights = kind, with_items, with_weights
        dtypes = (np.float32, np.uint8, np.int64, np.int32, *[np.int64] * with_items, *[np.float32] * with_weights)
        self._chunks = [tuple(np.empty(0, dtype) for dtype in dtypes)]

    def __len__(self) -> int:
        return sum(len(columns[0]) for columns in self._chunks)

    def add(self, score_N, label_N, user_hash_N, is_observed_N=None, time_s_N=None, item_N=None, weight_N=None):
        """Appends N rows, tensors or arrays: score, label 0 or 1, int64 hash of the user. Copies to the CPU (GPU sync).

        `is_observed_N`: bool [N], None means all; rows that are not observed are left out and may hold anything.
        `time_s_N`: int64 epoch seconds of the requests; None, or a negative time, means unknown. Requests of unknown
        time share one day, so without any time `gauc_user_day` is `gauc`.
        `item_N`: table indices int64, needed and read only with items.
        `weight_N`: how often each row counts, float32 of at least 0; needed and read only with weights.
        ValueError for lengths that differ, labels other than 0 and 1, scores not finite.
        """
        score_N, label_N, user_hash_N = _array(score_N, np.float32), _array(label_N), _array(user_hash_N, np.int64)
        time_s_N = np.full(score_N.shape, -1) if time_s_N is None else _array(time_s_N, np.int64)
        more = [_array(item_N, np.int64)] if self.with_items else []
        more += [_array(weight_N, np.float32)] if self.with_weights else []
        columns: tuple[np.ndarray, ...] = (score_N, label_N, user_hash_N, _day(time_s_N), *more)
        if score_N.ndim != 1 or any(column.shape != score_N.shape for column in columns):
            shapes = [column.shape for column in columns]
            names = "score, label, user_hash, time, item and weight"
            raise ValueError(f"expected {names} as vectors of one length, got shapes {shapes}")
        if is_observed_N is not None:
            is_observed_N = _array(is_observed_N, np.bool_)
            if is_observed_N.shape != score_N.shape:
                raise ValueError(f"is_observed has shape {is_observed_N.shape}, the scores have {score_N.shape}")
            columns = tuple(column[is_observed_N] for column in columns)
        score_N, label_N, *others = columns
        self._check(score_N, label_N)
        self._chunks.append((score_N, label_N.astype(np.uint8), *others))

    def _check(self, score_N: np.ndarray, label_N: np.ndarray) -> None:
        is_bad = ~((label_N == 0) | (label_N == 1))
        if is_bad.any():
            raise ValueError(
                f"{is_bad.sum()} of {len(label_N)} labels are not 0 or 1, the first is {label_N[is_bad][0]!r}"
            )
        is_bad = ~np.isfinite(score_N)
        if is_bad.any():
            found = f"{is_bad.sum()} of {len(score_N)} scores ({self.kind})"
            raise ValueError(f"{found} are not finite, the first is {score_N[is_bad][0]!r}")

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Returns this rank's rows in the order of `add`: score float32 [N], label uint8, user_hash int64, day int32.

        With items their table indices follow, then the weights if rows have them.
        """
        if len(self._chunks) > 1:
            self._chunks = [tuple(map(np.concatenate, zip(*self._chunks)))]
        return self._chunks[0]

    def items(self) -> np.ndarray:
        """Returns the table index of each candidate, int64 [N]. ValueError if they were not collected."""
        if not self.with_items:
            raise ValueError(
                "these predictions were collected without items; make them by Predictions(with_items=True)"
            )
        return self.arrays()[4]

    def select(self, is_kept_N: np.ndarray) -> "Predictions":
        """Returns the rows where bool [N], in the order of `arrays`, is true."""
        selected = Predictions(self.kind, with_items=self.with_items, with_weights=self.with_weights)
        selected._chunks = [tuple(column[is_kept_N] for column in self.arrays())]
        return selected

    def metrics(self) -> dict[str, float | int]:
        """Computes the metrics of this rank's rows only; `gather_metrics` covers all ranks."""
        score_N, label_N, user_hash_N, day_N = self.arrays()[:4]
        weight_N = self.arrays()[-1] if self.with_weights else None
        return classification_metrics(score_N, label_N, user_hash_N, self.kind, day_N, weight_N)

    def gather(self) -> "Predictions":
        """Sends all rows to rank 0, which needs memory for them; other ranks get an empty object.

        Collective if there is a process group; without one, these are all rows. Ranks may hold different numbers of
        rows, also none. ValueError if they hold different kinds of scores.
        """
        if not dist.is_initialized():
            return self
        own_2 = torch.tensor([len(self), KINDS.index(self.kind)])
        all_2 = [torch.empty_like(own_2) for _ in range(dist.get_world_size())]
        dist.all_gather(all_2, own_2)
        counts, kinds = torch.stack(all_2).T.tolist()
        if len(set(kinds)) > 1:
            raise ValueError(f"ranks hold different kinds of scores: {[KINDS[kind] for kind in kinds]}")

        gathered = Predictions(self.kind, with_items=self.with_items, with_weights=self.with_weights)
        columns = self.arrays()
        if dist.get_rank() == 0:
            gathered._chunks.append(columns)
            for source in range(1, len(counts)):
                gathered._chunks.append(tuple(_receive(c.dtype, counts[source], source) for c in columns))
        else:
            for column in columns:
                for part in torch.from_numpy(column).split(_MESSAGE_ROWS):
                    if len(part):
                        dist.send(part, 0)
        return gathered


def gather_metrics(
    predictions: collections.abc.Mapping[str, Predictions], keep: dict[str, Predictions] | None = None
) -> dict[str, dict[str, float | int]]:
    """Computes METRIC_KEYS per task over the rows of all ranks. Collective: all ranks must call with the same tasks.

    Rank 0 gathers the rows and computes, one task after the other. It broadcasts the few numbers, so every rank returns
    the same, or fails alike. `keep` gets the gathered rows of each task on rank 0.
    """
    results = {}
    for task in sorted(predictions):  # ranks may have built their dicts in different orders
        gathered = predictions[task].gather()
        results[task] = on_main(gathered.metrics)
        if keep is not None and (not dist.is_initialized() or dist.get_rank() == 0):
            keep[task] = gathered
    return {task: results[task] for task in predictions}


def classification_metrics(
    score_N: np.ndarray,
    label_N: np.ndarray,
    user_hash_N: np.ndarray,
    kind: str = "logit",
    day_N: np.ndarray | None = None,
    weight_N: np.ndarray | None = None,
) -> dict[str, float | int]:
    """Computes METRIC_KEYS of N rows in float64. `day_N` None: all rows are of one day.

    With `weight_N` a row counts that often in every mean, sum and pair, but once in the counts (`rows`, `gauc_users`,
    ...). Weights that are all 1 give the bits of none.
    """
    score_N, label_N = np.asarray(score_N, np.float32), np.asarray(label_N)
    weight_N = None if weight_N is None or (weight_N == 1).all() else np.asarray(weight_N, np.float64)
    keys_N, positive_N, negative_N = _sorted_classes(_sort_keys(score_N, label_N), weight_N)
    positives, negatives = positive_N.sum().item(), negative_N.sum().item()
    rows, total = len(keys_N), positives + negatives
    auc, label_rate = math.nan, positives / total if total else math.nan
    if 0 < positives < total:
        # Without weights pairs are counted in integers: only the last division rounds. A tie counts half.
        starts_G = _group_starts(keys_N >> np.uint64(1))
        positive_G, negative_G = np.add.reduceat(positive_N, starts_G), np.add.reduceat(negative_N, starts_G)
        below_G = np.cumsum(negative_G) - negative_G
        twice_wins = (positive_G * (2 * below_G + negative_G)).sum().item()
        auc = twice_wins / (2 * positives * negatives)
    log_loss, probability_sum = _log_loss_and_probability_sum(_scores(keys_N), positive_N, negative_N, kind)
    entropy = -sum(rate * math.log(rate) for rate in (label_rate, 1 - label_rate) if rate > 0)
    user_N = _numbered(np.asarray(user_hash_N, np.int64))
    gauc, gauc_users = _gauc(score_N, label_N, user_N, weight_N)
    by_day, gauc_user_days = gauc, gauc_users
    if day_N is not None and len(user_N):
        day_N = _numbered(np.asarray(day_N))
        by_day, gauc_user_days = _gauc(score_N, label_N, _numbered(user_N * (day_N.max() + 1) + day_N), weight_N)
    return {
        "auc": auc,
        "gauc": gauc,
        "gauc_user_day": by_day,
        "log_loss": log_loss,
        "ne": log_loss / entropy if 0 < positives < total else math.nan,
        "calibration": probability_sum / positives if positives else math.nan,
        "rows": rows,
        "gauc_users": gauc_users,
        "gauc_user_days": gauc_user_days,
        "label_rate": label_rate,
    }


def _sort_keys(score_N: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Packs score and label into uint64 [N] whose order is that of (score, label), so sorting needs no argsort.

    Positive floats order like their bits, negative ones in reverse; -0.0 becomes 0.0 so that they tie.
    """
    bits_N = (score_N + np.float32(0)).view(np.uint32)
    ordered_N = np.where(bits_N >> 31 == 1, ~bits_N, bits_N | np.uint32(1 << 31))
    return (ordered_N.astype(np.uint64) << np.uint64(1)) | label_N.astype(np.uint64)


def _sorted_classes(keys_N: np.ndarray, weight_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorts keys whose last bit is the label: (keys, weights of positives, weights of negatives), 0 in other rows.

    Weights are int64 ones where there are none, so that sums of them are exact.
    """
    if weight_N is None:
        keys_N = np.sort(keys_N)
        label_N = (keys_N & np.uint64(1)).astype(np.int64)
        return keys_N, label_N, 1 - label_N
    order_N = np.lexsort((weight_N, keys_N))  # weights too, so that sums do not depend on the order of the rows
    keys_N, weight_N = keys_N[order_N], weight_N[order_N]
    label_N = (keys_N & np.uint64(1)).astype(np.int64)
    return keys_N, label_N * weight_N, (1 - label_N) * weight_N


def _scores(keys_N: np.ndarray) -> np.ndarray:
    """Unpacks the float32 scores from sort keys."""
    ordered_N = (keys_N >> np.uint64(1)).astype(np.uint32)
    return np.where(ordered_N >> 31 == 1, ordered_N & np.uint32((1 << 31) - 1), ~ordered_N).view(np.float32)


def _group_starts(keys_N: np.ndarray) -> np.ndarray:
    """Finds the first row of each run of equal keys in a sorted array; empty for an empty one."""
    if not len(keys_N):
        return np.empty(0, np.int64)
    return np.concatenate([[0], np.flatnonzero(keys_N[1:] != keys_N[:-1]) + 1])


def _day(time_s_N: np.ndarray) -> np.ndarray:
    """Returns the UTC day int32 [N] of epoch seconds; -1 for an unknown (negative) time."""
    return np.where(time_s_N < 0, -1, time_s_N // SECONDS_PER_DAY).astype(np.int32)


def _numbered(value_N: np.ndarray) -> np.ndarray:
    """Numbers the distinct values from 0 in their order: int64 [N]."""
    return np.unique(value_N, return_inverse=True)[1]


def _gauc(
    score_N: np.ndarray, label_N: np.ndarray, user_N: np.ndarray, weight_N: np.ndarray | None
) -> tuple[float, int]:
    """Averages the AUCs of groups (users numbered from 0), weighted by impressions; also returns their number.

    Sorts (user, score, label) once.
    """
    assert not len(user_N) or user_N.max() < 1 << 31, "more than 2^31 users do not fit into the sort key"
    keys_N = (user_N.astype(np.uint64) << np.uint64(33)) | _sort_keys(score_N, label_N)
    keys_N, positive_N, negative_N = _sorted_classes(keys_N, weight_N)
    starts_G = _group_starts(keys_N >> np.uint64(1))  # runs of equal (user, score)
    if not len(starts_G):
        return math.nan, 0
    positive_G, negative_G = np.add.reduceat(positive_N, starts_G), np.add.reduceat(negative_N, starts_G)
    starts_U = _group_starts(keys_N[starts_G] >> np.uint64(33))
    positive_U = np.add.reduceat(positive_G, starts_U)
    negative_U = np.add.reduceat(negative_G, starts_U)
    of_earlier_users_U = np.cumsum(negative_U) - negative_U
    groups_per_user_U = np.diff(np.append(starts_U, len(starts_G)))
    below_G = np.cumsum(negative_G) - negative_G - np.repeat(of_earlier_users_U, groups_per_user_U)
    twice_wins_U = np.add.reduceat(positive_G * (2 * below_G + negative_G), starts_U)
    has_both_U = (positive_U > 0) & (negative_U > 0)
    if not has_both_U.any():
        return math.nan, 0
    auc_U = twice_wins_U[has_both_U] / (2 * positive_U * negative_U)[has_both_U]
    impressions_U = (positive_U + negative_U)[has_both_U]
    return float((auc_U * impressions_U).sum() / impressions_U.sum()), int(has_both_U.sum())


def _log_loss_and_probability_sum(
    score_N: np.ndarray, positive_N: np.ndarray, negative_N: np.ndarray, kind: str
) -> tuple[float, float]:
    """Computes mean cross entropy (nats) and sum of probabilities; both NaN for kind "score" or without weight."""
    weight_N = positive_N + negative_N
    if kind == "score" or not weight_N.sum():
        return math.nan, math.nan
    score_N, label_N = score_N.astype(np.float64), (positive_N > 0).astype(np.int64)
    tail_N = np.exp(-np.abs(score_N))  # never overflows
    loss_N = np.maximum(score_N, 0) + np.log1p(tail_N) - score_N * label_N
    probability_N = np.where(score_N >= 0, 1.0, tail_N) / (1 + tail_N)
    if weight_N.dtype == np.int64:
        return float(loss_N.mean()), float(probability_N.sum())
    return float((loss_N * weight_N).sum() / weight_N.sum()), float((probability_N * weight_N).sum())


def _array(values, dtype: type | None = None) -> np.ndarray:
    """Copies to a numpy array, so that the caller may reuse its buffer."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()  # numpy has no bfloat16
    return np.array(values, dtype=dtype)


def _receive(dtype: np.dtype, rows: int, source: int) -> np.ndarray:
    """Receives one column of one rank, in messages of at most _MESSAGE_ROWS rows."""
    column = np.empty(rows, dtype)
    for part in torch.from_numpy(column).split(_MESSAGE_ROWS):
        if len(part):
            dist.recv(part, source)
    return column
