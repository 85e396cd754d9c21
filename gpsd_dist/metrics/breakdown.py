"""Says how sure scores are and where they are good: intervals, calibration, and metrics by group of candidates.

Needs numpy alone. Rows are sorted first, so the bits depend neither on their order nor on the number of ranks. Shape
letters: N rows (candidates), U users, G groups.
"""

import dataclasses
import datetime
import math
import typing

import numpy as np

from gpsd_dist import schema
from gpsd_dist.metrics.auc_interval import auc_by_user, half_width
from gpsd_dist.metrics.binary_metrics import auc_by_group, loss_and_probability

KEY = "breakdown"
"""Name of a breakdown among the metrics of a task in the file of `evaluate --metrics_out`."""
HISTORY_STARTS = (0, 1, 3, 6, 11, 21, 51, 101, 201, 501, 1001)  # shortest history of each group
CALIBRATION_BINS = 15  # of about equal numbers of rows
MOST_DAYS = 31  # groups of days; longer splits have several days in each


@dataclasses.dataclass(frozen=True)
class ScoredRows:
    """Holds the scored candidates of one task."""

    kind: str  # "logit", or "score", which is no probability
    score_N: np.ndarray  # float32
    label_N: np.ndarray  # 0 or 1
    user_hash_N: np.ndarray  # int64
    day_N: np.ndarray  # int32, UTC day since 1970; -1: unknown
    item_N: np.ndarray | None = None  # int64, table row
    history_N: np.ndarray | None = None  # int32, events in the history that the model reads; -1: unknown
    weight_N: np.ndarray | None = None  # how often a row counts; None: once

    def select(self, rows_N: np.ndarray) -> "ScoredRows":
        """Returns the rows that bool [N] or int64 [N] picks."""
        columns = ("score_N", "label_N", "user_hash_N", "day_N", "item_N", "history_N", "weight_N")
        values = {name: getattr(self, name) for name in columns}
        return dataclasses.replace(self, **{name: v if v is None else v[rows_N] for name, v in values.items()})


def breakdown(rows: ScoredRows) -> dict[str, typing.Any]:
    """Makes what the report shows beside a score.

    - `half_width`: metric -> half of its 95 % interval over users (the users' influence on the metric, first order).
      Seeds are not covered.
    - `calibration`: bins of ascending scores with `rows`, mean `predicted` probability, `observed` rate; [] of a score.
    - `groups`: "history", "item", "day" -> groups with `name`, `rows`, `positives`, `auc`, `auc_half_width`, `log_loss`
      and `calibration` (sum of probabilities over positives). What is not known of all rows is left out.
    """
    weight_N = np.ones(len(rows.score_N)) if rows.weight_N is None else rows.weight_N.astype(np.float64)
    rows = dataclasses.replace(rows, weight_N=weight_N, score_N=np.asarray(rows.score_N, np.float32))
    rows = rows.select(np.lexsort((weight_N, rows.label_N, rows.score_N, rows.user_hash_N)))
    groupings = {"history": _by_history(rows), "item": _by_item(rows), "day": _by_day(rows)}
    return {
        "half_width": _half_widths(rows),
        "calibration": _calibration(rows),
        "groups": {
            name: [{"name": group} | _facts(rows.select(is_in_N)) for group, is_in_N in groups]
            for name, groups in groupings.items()
            if groups
        },
    }


def _half_widths(rows: ScoredRows) -> dict[str, float]:
    user_N = np.unique(rows.user_hash_N, return_inverse=True)[1]
    day_N = np.unique(rows.day_N, return_inverse=True)[1]
    found = {"auc": _facts(rows)["auc_half_width"], "gauc": _gauc_half_width(rows, user_N, user_N)}
    found["gauc_user_day"] = _gauc_half_width(rows, user_N * (day_N.max(initial=0) + 1) + day_N, user_N)
    if rows.kind == "logit" and rows.weight_N.any():
        loss_N, probability_N = loss_and_probability(rows.score_N, rows.label_N == 1)
        total, positives = rows.weight_N.sum(), (rows.weight_N * rows.label_N).sum()
        found["log_loss"] = _of_sum(rows.weight_N * (loss_N - np.average(loss_N, weights=rows.weight_N)), total, user_N)
        calibration = (rows.weight_N * probability_N).sum() / positives if positives else math.nan
        found["calibration"] = _of_sum(rows.weight_N * (probability_N - calibration * rows.label_N), positives, user_N)
    return found


def _of_sum(part_N: np.ndarray, total: float, user_N: np.ndarray) -> float:
    """Gives the half width of a ratio whose numerator is off by `part_N` of each row."""
    return half_width(np.bincount(user_N, part_N) / total) if total else math.nan


def _gauc_half_width(rows: ScoredRows, group_N: np.ndarray, user_N: np.ndarray) -> float:
    _, first_G, group_N = np.unique(group_N, return_index=True, return_inverse=True)
    group_U, auc_U, weight_U = auc_by_group(rows.score_N, rows.label_N, group_N, rows.weight_N)
    if not len(auc_U):
        return math.nan
    gauc = np.average(auc_U, weights=weight_U)
    user_U = np.unique(user_N[first_G][group_U], return_inverse=True)[1]
    return _of_sum(weight_U * (auc_U - gauc), weight_U.sum(), user_U)


def _facts(rows: ScoredRows) -> dict[str, typing.Any]:
    """Computes the metrics of one group."""
    facts: dict[str, typing.Any] = {"rows": len(rows.label_N), "positives": int(rows.label_N.sum())}
    facts |= dict.fromkeys(("auc", "auc_half_width", "log_loss", "calibration"), math.nan)
    try:
        found = auc_by_user(rows.score_N, rows.label_N, rows.user_hash_N, rows.weight_N)
        facts |= {"auc": found.auc, "auc_half_width": found.half_width}
    except ValueError:  # one class alone
        pass
    if rows.kind == "logit" and rows.weight_N.any():
        loss_N, probability_N = loss_and_probability(rows.score_N, rows.label_N == 1)
        facts["log_loss"] = float(np.average(loss_N, weights=rows.weight_N))
        positives = (rows.weight_N * rows.label_N).sum()
        facts["calibration"] = float((rows.weight_N * probability_N).sum() / positives) if positives else math.nan
    return facts


def _calibration(rows: ScoredRows) -> list[dict[str, float | int]]:
    """Cuts the rows by score into bins; rows of one score share a bin."""
    if rows.kind != "logit" or not len(rows.score_N):
        return []
    edges = np.unique(np.quantile(rows.score_N, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS, method="lower"))
    bin_N, probability_N = np.searchsorted(edges, rows.score_N), loss_and_probability(rows.score_N, rows.label_N)[1]
    rows_G, weight_G = np.bincount(bin_N), np.bincount(bin_N, rows.weight_N)
    sums = (np.bincount(bin_N, rows.weight_N * value_N) for value_N in (probability_N, rows.label_N))
    columns = zip(rows_G.tolist(), weight_G.tolist(), *(sum_G.tolist() for sum_G in sums), strict=True)
    return [{"rows": n, "predicted": p / weight, "observed": y / weight} for n, weight, p, y in columns if weight]


_Groups = list[tuple[str, np.ndarray]]


def _by_history(rows: ScoredRows) -> _Groups:
    if rows.history_N is None or (rows.history_N < 0).any():
        return []
    group_N = np.searchsorted(HISTORY_STARTS, rows.history_N, side="right") - 1
    lasts = [start - 1 for start in HISTORY_STARTS[1:]]
    names = [f"{low}" if low == last else f"{low}-{last}" for low, last in zip(HISTORY_STARTS, lasts)]
    names.append(f"{HISTORY_STARTS[-1]}+")
    return [(names[group], group_N == group) for group in np.unique(group_N)]


def _by_item(rows: ScoredRows) -> _Groups:
    if rows.item_N is None:
        return []
    is_new_N = rows.item_N < schema.NUM_RESERVED_ROWS
    return [(name, is_in_N) for name, is_in_N in (("known", ~is_new_N), ("new", is_new_N)) if is_in_N.any()]


def _by_day(rows: ScoredRows) -> _Groups:
    if not len(rows.day_N) or (rows.day_N < 0).any():
        return []
    first, last = int(rows.day_N.min()), int(rows.day_N.max())
    days = math.ceil((last - first + 1) / MOST_DAYS)
    group_N = (rows.day_N - first) // days
    groups = []
    for group in np.unique(group_N).tolist():
        begin = first + group * days
        ends = dict.fromkeys((begin, min(begin + days - 1, last)))
        groups.append((" to ".join(map(_date, ends)), group_N == group))
    return groups


def _date(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()
