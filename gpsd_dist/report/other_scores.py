"""Makes tables of what is scored and measured outside of run folders: files of `predict`, serving benchmarks."""

import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist.metrics.binary_metrics import SECONDS_PER_DAY, classification_metrics
from gpsd_dist.metrics.breakdown import ScoredRows, breakdown
from gpsd_dist.report.intervals import width_text
from gpsd_dist.report.tables import MISSING, Cell, Row, Table, count_text, metric_text, number_cell

_METRICS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "log loss", "calibration": "calibration"}
_ASKED = ("scenario", "history", "candidates", "cores", "machine_load")
_Found = typing.Sequence[tuple[pathlib.Path, dict[str, typing.Any]]]


def predictions_table(found: _Found, problems: list[str]) -> Table | None:
    """Scores files of `gpsd-dist predict` that have labels; the others show their numbers of rows."""
    rows = []
    for folder, summary in found:
        for task in summary.get("tasks", []):
            of_what = f"{summary.get('data', '')} {summary.get('split', 'requests')}".strip()
            cells = [Cell(folder.name, f"{summary.get('version', '')}"), Cell(of_what), Cell(f"{task}")]
            cells.append(number_cell(count_text(summary.get("candidates"))))
            try:
                cells += _scores(folder, summary, f"{task}")
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                problems.append(f"{folder}: its predictions cannot be scored ({error})")
                cells += [number_cell(MISSING)] * len(_METRICS)
            rows.append(Row(tuple(cells)))
    headers = (Cell("folder"), Cell("data"), Cell("task"), number_cell("candidates"))
    return Table((*headers, *map(number_cell, _METRICS.values())), (tuple(rows),)) if rows else None


def _scores(folder: pathlib.Path, summary: dict[str, typing.Any], task: str) -> list[Cell]:
    """Computes the metrics from the files; cells without numbers where they hold no labels."""
    paths, label = [folder / name for name in summary["files"]], f"{task}.label"
    if not all(label in pq.read_schema(path).names for path in paths):
        return [number_cell(MISSING, "no labels")] + [number_cell(MISSING)] * (len(_METRICS) - 1)
    columns = ["user_id", "request_time_s", f"{task}.logit", label]
    table = pa.concat_tables(pq.read_table(path, columns=columns) for path in paths)
    table = table.filter(table[label].is_valid()).combine_chunks()
    user_N = (
        pc.dictionary_encode(pc.fill_null(table["user_id"], "")).combine_chunks().indices.to_numpy().astype(np.int64)
    )
    time_s_N, logit_N, label_N = (table[name].to_numpy() for name in columns[1:])
    day_N = np.where(time_s_N < 0, -1, time_s_N // SECONDS_PER_DAY).astype(np.int32)
    metrics = classification_metrics(logit_N, label_N, user_N, day_N=day_N)
    widths = breakdown(ScoredRows("logit", logit_N, label_N, user_N, day_N))["half_width"]
    return [number_cell(metric_text(name, metrics[name]), width_text(widths.get(name))) for name in _METRICS]


def serving_table(found: _Found) -> Table | None:
    """Shows files of `benchmarks.serving --out`: what was asked, the figures, and the load of the machine."""
    rows = []
    for path, measured in found:
        figures = {name: _text(value) for name, value in measured.items() if name not in _ASKED}
        cells = [Cell(path.stem), Cell(f"{measured['scenario']}")]
        cells += [number_cell(f"{measured[name]}") for name in ("history", "candidates")]
        cells.append(Cell("; ".join(f"{name}: {text}" for name, text in figures.items() if text)))
        cells.append(Cell(f"{_text(measured['machine_load'])} of {measured.get('cores', '?')} cores"))
        rows.append(Row(tuple(cells)))
    headers = (Cell("file"), Cell("scenario"), number_cell("history"), number_cell("candidates"), Cell("measured"))
    return Table((*headers, Cell("load of the machine")), (tuple(rows),)) if rows else None


def _text(value: typing.Any) -> str:
    """Writes a number, the median of a spread with its range, or the entries of an object."""
    if isinstance(value, dict):
        if set(value) == {"median", "min", "max"}:
            return f"{_text(value['median'])} ({_text(value['min'])} to {_text(value['max'])})"
        return ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return " to ".join(dict.fromkeys(_text(entry) for entry in value[:: max(1, len(value) - 1)]))
    return f"{value:g}" if isinstance(value, float) else f"{value}"
