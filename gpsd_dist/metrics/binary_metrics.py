"""Computes exact classification metrics with numpy alone: AUC, GAUC, log loss, normalised entropy, calibration.

Nothing is binned, windowed or dropped. Sums run over sorted rows, so the bits do not depend on the order of the rows.
"""

import math

import numpy as np

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


def _numbered(value_N: np.ndarray) -> np.ndarray:
    """Numbers the distinct values from 0 in their order: int64 [N]."""
    return np.unique(value_N, return_inverse=True)[1]


def _gauc(
    score_N: np.ndarray, label_N: np.ndarray, user_N: np.ndarray, weight_N: np.ndarray | None
) -> tuple[float, int]:
    """Averages the AUCs of groups (users numbered from 0), weighted by impressions; also returns their number."""
    _, auc_U, impressions_U = auc_by_group(score_N, label_N, user_N, weight_N)
    if not len(auc_U):
        return math.nan, 0
    return float((auc_U * impressions_U).sum() / impressions_U.sum()), len(auc_U)


def auc_by_group(
    score_N: np.ndarray, label_N: np.ndarray, group_N: np.ndarray, weight_N: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the AUC within each group that has both classes: (number of the group, AUC, weight of its rows) [U].

    Groups are numbered from 0. Sorts (group, score, label) once.
    """
    assert not len(group_N) or group_N.max() < 1 << 31, "more than 2^31 groups do not fit into the sort key"
    keys_N = (group_N.astype(np.uint64) << np.uint64(33)) | _sort_keys(score_N, label_N)
    keys_N, positive_N, negative_N = _sorted_classes(keys_N, weight_N)
    starts_G = _group_starts(keys_N >> np.uint64(1))  # runs of equal (group, score)
    if not len(starts_G):
        return np.empty(0, np.int64), np.empty(0), np.empty(0)
    positive_G, negative_G = np.add.reduceat(positive_N, starts_G), np.add.reduceat(negative_N, starts_G)
    group_G = keys_N[starts_G] >> np.uint64(33)
    starts_U = _group_starts(group_G)
    positive_U = np.add.reduceat(positive_G, starts_U)
    negative_U = np.add.reduceat(negative_G, starts_U)
    of_earlier_groups_U = np.cumsum(negative_U) - negative_U
    runs_U = np.diff(np.append(starts_U, len(starts_G)))
    below_G = np.cumsum(negative_G) - negative_G - np.repeat(of_earlier_groups_U, runs_U)
    twice_wins_U = np.add.reduceat(positive_G * (2 * below_G + negative_G), starts_U)
    has_both_U = (positive_U > 0) & (negative_U > 0)
    auc_U = twice_wins_U[has_both_U] / (2 * positive_U * negative_U)[has_both_U]
    return group_G[starts_U][has_both_U].astype(np.int64), auc_U, (positive_U + negative_U)[has_both_U]


def _log_loss_and_probability_sum(
    score_N: np.ndarray, positive_N: np.ndarray, negative_N: np.ndarray, kind: str
) -> tuple[float, float]:
    """Computes mean cross entropy (nats) and sum of probabilities; both NaN for kind "score" or without weight."""
    weight_N = positive_N + negative_N
    if kind == "score" or not weight_N.sum():
        return math.nan, math.nan
    loss_N, probability_N = loss_and_probability(score_N, positive_N > 0)
    if weight_N.dtype == np.int64:
        return float(loss_N.mean()), float(probability_N.sum())
    return float((loss_N * weight_N).sum() / weight_N.sum()), float((probability_N * weight_N).sum())


def loss_and_probability(score_N: np.ndarray, is_positive_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the cross entropy (nats) and the probability of each logit, float64 [N]."""
    score_N = score_N.astype(np.float64)
    tail_N = np.exp(-np.abs(score_N))  # never overflows
    loss_N = np.maximum(score_N, 0) + np.log1p(tail_N) - score_N * is_positive_N
    return loss_N, np.where(score_N >= 0, 1.0, tail_N) / (1 + tail_N)
