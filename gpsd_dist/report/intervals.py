"""Looks up scores and how sure they are: half widths of 95 % intervals."""

import math
import typing

from gpsd_dist.metrics.auc_interval import Z_95, half_width_of_counts
from gpsd_dist.report.beside import Floor
from gpsd_dist.report.run_folder import Run

_SHARES = ("hr", "mrr", "ndcg")  # means of numbers between 0 and 1, one of each request


def value_of(scored: Run | Floor, split: str, task: str, metric: str) -> float | None:
    """Returns a metric of a scored split; for "valid" of a run at the best step unless there is a valid.json."""
    if split in scored.scores:
        return scored.scores[split].get(task, {}).get(metric)
    return scored.best_metrics.get(f"{task}/{metric}") if split == "valid" and isinstance(scored, Run) else None


def half_width_of(scored: Run | Floor, split: str, task: str, metric: str) -> float | None:
    """Returns the half width of a metric's interval; None if it is not known.

    The breakdown of the split has it, over users. Without one, an AUC's follows from its numbers of rows, which counts
    rows as independent; that of a ranking metric is at most that of a share (hit rates: exactly).
    """
    made = scored.breakdowns.get(split, {}).get(task, {}).get("half_width", {}).get(metric, math.nan)
    if math.isfinite(made):
        return made
    value, rows, rate = (value_of(scored, split, task, name) for name in (metric, "rows", "label_rate"))
    if value is None or rows is None or not 0 <= value <= 1 or not rows > 0:
        return None
    if metric == "auc" and rate is not None and math.isfinite(rate):
        width = half_width_of_counts(value, round(rows * rate), round(rows * (1 - rate)))
        return width if math.isfinite(width) else None
    return Z_95 * math.sqrt(value * (1 - value) / rows) if metric.split("@")[0] in _SHARES else None


def mean_width(widths: typing.Sequence[float | None]) -> float:
    """Averages the half widths of seeds: they score the same rows, so their mean is hardly surer. NaN if one lacks."""
    known = [width for width in widths if width is not None]
    return sum(known) / len(known) if known and len(known) == len(widths) else math.nan


def width_text(width: float | None) -> str:
    """Writes "+- 0.0041"; "" for a width that is not known."""
    if width is None or not math.isfinite(width):
        return ""
    return f"+- {width:.4f}"
