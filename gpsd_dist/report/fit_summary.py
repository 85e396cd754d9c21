"""Shows what `fit` found, from its `summary.json`: tables of all baselines and models, the verdict, what next."""

import dataclasses
import math
import typing

from gpsd_dist.report.tables import MISSING, Cell, Row, Table, metric_text, number_cell

COLUMNS = ("", "valid AUC", "test AUC", "- floor", "GAUC", "log loss")
FLOORS = ("floor", "floor_refit")  # kinds of rows
CAPTION = (
    "+- is half of a 95 % interval over the users of test; another seed of the training is not covered. The choice was "
    "made on valid; test was scored after it. refit: made again on train + valid. '- floor' is the difference on the "
    "same users (paired) from the strongest line of the upper part, for a refit from the strongest with refitted trees."
)


@dataclasses.dataclass(frozen=True)
class FitSummary:
    """Holds what stands at the top of the page about one fit."""

    name: str
    verdicts: tuple[str, ...]
    tables: tuple[Table, ...]
    hints: tuple[str, ...]


def fit_summary(name: str, summary: dict[str, typing.Any]) -> FitSummary:
    """Reads the content of a `summary.json`. ValueError if it has another form."""
    try:
        verdicts = tuple(map(str, summary["verdicts"].values()))
        return FitSummary(name, verdicts, tuple(tables(summary)), tuple(map(str, summary.get("next", []))))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: not the summary.json of a fit ({error!r})") from error


def tables(summary: dict[str, typing.Any]) -> list[Table]:
    """Makes one table per task: what needs no model above, models and refits below; the chosen one is bold."""
    rows = [*summary["floors"], *summary["rows"], *summary["refit"]]
    made = []
    for task in summary["verdicts"]:
        of_task = [row for row in rows if row["task"] == task]
        parts = ([row for row in of_task if (row["kind"] in FLOORS) == is_floor] for is_floor in (True, False))
        groups = tuple(tuple(_row(row, summary.get("chosen", "")) for row in part) for part in parts)
        made.append(Table((Cell(COLUMNS[0]), *map(number_cell, COLUMNS[1:])), groups, caption=f"{task}. {CAPTION}"))
    return made


def _row(row: dict[str, typing.Any], chosen: str) -> Row:
    is_best = row["label"] == chosen
    auc = _with_width(row.get("auc"), row.get("auc_half_width"))
    difference = _with_width(row.get("minus_floor"), row.get("minus_floor_half_width"), "+")
    cells = [Cell(f"{row['label']}", is_strong=is_best), number_cell(_digits(row.get("valid_auc")))]
    cells += [number_cell(auc, is_strong=is_best), number_cell(difference)]
    return Row((*cells, *(number_cell(metric_text(name, row.get(name))) for name in ("gauc", "log_loss"))))


def _digits(value: float | None, sign: str = "") -> str:
    return MISSING if value is None or math.isnan(value) else f"{value:{sign}.4f}"


def _with_width(value: float | None, width: float | None, sign: str = "") -> str:
    known = _digits(value, sign)
    return known if known == MISSING or width is None or math.isnan(width) else f"{known} +- {width:.3f}"
