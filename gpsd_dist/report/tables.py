"""Defines tables of text and how numbers are written. Knows neither runs nor HTML."""

import dataclasses
import datetime
import math
import statistics
import typing

MISSING = "-"
_COST: dict[str, typing.Callable[[float], float]] = {  # metric without its @k -> what the best value makes smallest
    **dict.fromkeys(("auc", "auc_item_count", "gauc", "gauc_user_day", "mrr", "hr", "ndcg"), lambda value: -value),
    **dict.fromkeys(("log_loss", "ne"), lambda value: value),
    "calibration": lambda value: abs(value - 1),
}
_COUNTS = ("rows", "gauc_users", "gauc_user_days", "unknown_targets", "rows_item_count")
_NAMES_SHOWN = 6
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class Cell:
    """Holds plain text, which the template escapes."""

    text: str
    note: str = ""  # smaller, below the text: a range, a remark
    is_strong: bool = False
    is_number: bool = False
    style_index: int | None = None  # the line of that style is drawn before the text


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds one row; a mean over other rows is highlighted."""

    cells: tuple[Cell, ...]
    is_mean: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Holds groups of rows with a line between them. `spans` is a header row above: (text, columns) from the left."""

    columns: tuple[Cell, ...]
    groups: tuple[tuple[Row, ...], ...]
    spans: tuple[tuple[str, int], ...] = ()
    caption: str = ""


def number_cell(text: str, note: str = "", *, is_strong: bool = False) -> Cell:
    """Makes a cell that is set to the right, with digits of one width."""
    return Cell(text, note, is_strong=is_strong, is_number=True)


def metric_text(name: str, value: float | None) -> str:
    """Writes counts as whole numbers, other metrics with four digits after the point; NaN stays visible."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value}"
    return f"{value:,.0f}" if name.split("@")[0] in _COUNTS else f"{value:.4f}"


def mean_cell(name: str, values: typing.Sequence[float | None], *, is_strong: bool = False) -> Cell:
    """Writes the mean over seeds, and the range below it; "-" if a seed has no value, NaN if one is not finite."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        missing = f"{len(values) - len(known)} of {len(values)} missing" if known else ""
        return number_cell(MISSING, missing)
    if len(known) == 1 or not all(map(math.isfinite, known)):
        return number_cell(metric_text(name, statistics.fmean(known)), is_strong=is_strong)
    note = f"{metric_text(name, min(known))}-{metric_text(name, max(known))}"
    return number_cell(metric_text(name, statistics.fmean(known)), note, is_strong=is_strong)


def best_index(name: str, values: typing.Sequence[float | None]) -> int | None:
    """Finds the best of several values of one metric; None if fewer than two are finite or the metric is unknown."""
    cost_of = _COST.get(name.split("@")[0])
    if cost_of is None:
        return None
    cost = [math.nan if value is None else cost_of(value) for value in values]
    finite = [value for value in cost if math.isfinite(value)]
    return cost.index(min(finite)) if len(finite) > 1 else None


def count_text(value: typing.Any) -> str:
    """Writes 12,345, or "-" for a value that is no finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return f"{value:,.0f}" if is_number else MISSING


def bytes_text(value: typing.Any) -> str:
    """Writes bytes like 3.8 MiB."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return MISSING
    amount, unit = float(value), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}" if unit else f"{amount:.0f} {_UNITS[0]}"


def time_text(time_s: typing.Any) -> str:
    """Writes epoch seconds as UTC to the minute."""
    if not isinstance(time_s, int | float) or isinstance(time_s, bool):
        return MISSING
    try:
        return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return MISSING


def duration_text(seconds: float) -> str:
    """Writes seconds like 47 s, 12 min 5 s, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def option_text(value: typing.Any) -> str:
    """Writes a value of run_config.json as one would type it; lists and dicts in short."""
    if isinstance(value, str):
        return value or "(empty)"
    if isinstance(value, list):
        return ", ".join(map(option_text, value)) or "(none)"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {option_text(entry)}" for key, entry in value.items()) or "(none)"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def listed(names: typing.Sequence[str]) -> str:
    """Writes names like "a, b, c and 12 more"."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
