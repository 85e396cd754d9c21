"""What the page's tables are made of, and how numbers are written. Knows neither runs nor HTML."""

import dataclasses
import datetime
import math
import statistics
import typing

MISSING = "-"
LARGER_IS_BETTER = ("auc", "gauc", "mrr", "hr", "ndcg")
SMALLER_IS_BETTER = ("log_loss", "ne")
NEAREST_ONE_IS_BEST = ("calibration",)
_COUNTS = ("rows", "gauc_users", "unknown_targets")
_NAMES_SHOWN = 6
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell; plain text, escaped by the template."""

    text: str
    note: str = ""  # Smaller, below the text: a range, a remark
    is_strong: bool = False
    is_number: bool = False
    style_index: int | None = None  # Shows the line of that style before the text


@dataclasses.dataclass(frozen=True)
class Row:
    """One row; a mean over the rows above or below it stands out."""

    cells: tuple[Cell, ...]
    is_mean: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows in groups (one body each, a line between). `spans`: (text, columns) of a header row above, from the left."""

    columns: tuple[Cell, ...]
    groups: tuple[tuple[Row, ...], ...]
    spans: tuple[tuple[str, int], ...] = ()
    caption: str = ""


def text_cells(values: typing.Iterable[str]) -> tuple[Cell, ...]:
    """Plain cells."""
    return tuple(Cell(value) for value in values)


def number_cell(text: str, note: str = "", *, is_strong: bool = False) -> Cell:
    """A cell that is set to the right, with digits of one width."""
    return Cell(text, note, is_strong=is_strong, is_number=True)


def metric_text(name: str, value: float | None) -> str:
    """A metric as on the page: whole numbers for counts, else four digits after the point; NaN stays visible."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value}"
    return f"{value:,.0f}" if name in _COUNTS else f"{value:.4f}"


def mean_cell(name: str, values: typing.Sequence[float | None], *, is_strong: bool = False) -> Cell:
    """Mean over seeds with the smallest and largest below it; "-" if a seed has no value, NaN if one is not finite."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        missing = f"{len(values) - len(known)} of {len(values)} missing" if known else ""
        return number_cell(MISSING, missing)
    if len(known) == 1 or not all(map(math.isfinite, known)):
        return number_cell(metric_text(name, statistics.fmean(known)), is_strong=is_strong)
    note = f"{metric_text(name, min(known))}-{metric_text(name, max(known))}"
    return number_cell(metric_text(name, statistics.fmean(known)), note, is_strong=is_strong)


def best_index(name: str, values: typing.Sequence[float | None]) -> int | None:
    """Which of several values of one metric is best; None if fewer than two are finite or nobody can say."""
    family = name.split("@")[0]
    if family in LARGER_IS_BETTER:
        cost = [-value if value is not None else math.nan for value in values]
    elif family in SMALLER_IS_BETTER:
        cost = [value if value is not None else math.nan for value in values]
    elif family in NEAREST_ONE_IS_BEST:
        cost = [abs(value - 1) if value is not None else math.nan for value in values]
    else:
        return None
    finite = [value for value in cost if math.isfinite(value)]
    return cost.index(min(finite)) if len(finite) > 1 else None


def count_text(value: typing.Any) -> str:
    """12,345, or "-" for what is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return f"{value:,.0f}" if is_number else MISSING


def bytes_text(value: typing.Any) -> str:
    """3.8 MiB"""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return MISSING
    amount, unit = float(value), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}" if unit else f"{amount:.0f} {_UNITS[0]}"


def time_text(time_s: typing.Any) -> str:
    """Epoch seconds as UTC to the minute."""
    if not isinstance(time_s, int | float) or isinstance(time_s, bool):
        return MISSING
    try:
        return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return MISSING


def duration_text(seconds: float) -> str:
    """47 s, 12 min 5 s, 3 h 20 min"""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def option_text(value: typing.Any) -> str:
    """A value of run_config.json as one would type it; lists and dicts in short."""
    if isinstance(value, str):
        return value or "(empty)"
    if isinstance(value, list):
        return ", ".join(map(option_text, value)) or "(none)"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {option_text(entry)}" for key, entry in value.items()) or "(none)"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def listed(names: typing.Sequence[str]) -> str:
    """a, b, c and 12 more"""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
