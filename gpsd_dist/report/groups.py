"""Draws where scores are good: calibration curves, and AUC by history length, known or new item, and day."""

import math
import re
import typing

from gpsd_dist.report.beside import Floor
from gpsd_dist.report.curves import Figure, slug
from gpsd_dist.report.families import Configuration, Family, seed_text
from gpsd_dist.report.figures import Line, Points, calibration_figure, group_figure
from gpsd_dist.report.intervals import width_text
from gpsd_dist.report.run_folder import Run
from gpsd_dist.report.tables import Cell, Row, Table, count_text, listed, metric_text, number_cell

WORDS = {"history": "events in the history", "item": "candidate's item", "day": "day of the request (UTC)"}
_TITLES = {"history": "history length", "item": "known or new item", "day": "day"}


def calibration(family: Family, floors: typing.Sequence[Floor], split: str, task: str) -> Figure | None:
    """Draws one line per run and floor whose scores are probabilities."""
    lines = []
    for made in family.configurations:
        for dash, run in enumerate(made.runs):
            label = f"{made.label}, seed {seed_text(run)} ({run.label})"
            lines += _curve(run, split, task, label, style_index=made.style_index, dash_index=dash)
    if not lines:
        return None
    for floor in floors:
        lines += _curve(floor, split, task, floor.label, is_muted=True, dash_index=1)
    title = f"calibration on {split}, {task}"
    svg = calibration_figure(lines, slug(family, f"calibration-{split}-{task}"), title)
    note = "each point: candidates of about equal scores; on the diagonal, what was predicted happens that often"
    note += "; dashed: needs no model" if any(line.is_muted for line in lines) else ""
    return Figure(title, svg, note)


def _curve(scored: Run | Floor, split: str, task: str, label: str, **style: typing.Any) -> list[Line]:
    bins = scored.breakdowns.get(split, {}).get(task, {}).get("calibration", [])
    x, y = (tuple(one[name] for one in bins) for name in ("predicted", "observed"))
    return [Line(label, x, y, has_markers=True, **style)] if bins else []


def group_results(
    family: Family, floors: typing.Sequence[Floor], split: str, task: str
) -> list[tuple[Figure | None, Table]]:
    """Makes a figure and a table per grouping that a run of the family has; no figure of a single group."""
    made = [made for made in family.configurations if any(_groups(run, split, task) for run in made.runs)]
    results = []
    for what in dict.fromkeys(what for one in made for run in one.runs for what in _groups(run, split, task)):
        columns: _Columns = [(_mean_groups(one, split, task, what), one) for one in made]
        columns += [({g["name"]: g for g in _groups(f, split, task).get(what, [])}, f) for f in floors]
        rows = {name: group["rows"] for groups, _ in reversed(columns) for name, group in groups.items()}
        # A model that reads the last 50 events has no histories of 60: its groups and those of the trees may differ.
        columns = [
            ({n: g for n, g in groups.items() if g["rows"] == rows[n]}, one) for groups, one in columns if groups
        ]
        names = (
            sorted(rows, key=lambda name: (int(re.match(r"\d*", name)[0] or 0), name)) if what != "item" else list(rows)
        )
        results.append((_figure(family, split, task, what, names, columns), _table(split, task, what, names, columns)))
    return results


_Columns = list[tuple[dict[str, dict[str, typing.Any]], Configuration | Floor]]


def _groups(scored: Run | Floor, split: str, task: str) -> dict[str, list[dict[str, typing.Any]]]:
    return scored.breakdowns.get(split, {}).get(task, {}).get("groups", {})


def _mean_groups(made: Configuration, split: str, task: str, what: str) -> dict[str, dict[str, typing.Any]]:
    """Averages the AUC of each group over the seeds that have it; rows are the same for all."""
    found: dict[str, list[dict[str, typing.Any]]] = {}
    for run in made.runs:
        for group in _groups(run, split, task).get(what, []):
            found.setdefault(group["name"], []).append(group)
    means = ("auc", "auc_half_width")
    return {n: same[0] | {m: sum(g[m] for g in same) / len(same) for m in means} for n, same in found.items()}


def _figure(family: Family, split: str, task: str, what: str, names: list[str], columns: _Columns) -> Figure | None:
    rows = []
    for groups, one in columns:
        of_groups = [groups.get(name, {}) for name in names]
        values, widths = (tuple(g.get(m, math.nan) for g in of_groups) for m in ("auc", "auc_half_width"))
        if any(map(math.isfinite, values)):
            is_muted = isinstance(one, Floor)
            style_index = one.style_index if isinstance(one, Configuration) else 0
            rows.append(Points(one.label, values, widths, style_index, is_muted))
    if len(names) < 2 or not rows:
        return None
    title = f"{split} AUC by {_TITLES[what]}, {task}"
    svg = group_figure(
        names, rows, slug(family, f"{what}-{split}-{task}"), title, y_label=f"{split} AUC", x_label=WORDS[what]
    )
    return Figure(title, svg, "line: 95 % interval over users")


def _table(split: str, task: str, what: str, names: list[str], columns: _Columns) -> Table:
    headers = [Cell(WORDS[what]), number_cell("candidates"), number_cell("positives")]
    headers += [Cell(one.label, is_number=True) for _, one in columns]
    rows = []
    for name in names:
        first = next(groups[name] for groups, _ in columns if name in groups)
        cells = [Cell(name), number_cell(count_text(first["rows"])), number_cell(count_text(first["positives"]))]
        for groups, _ in columns:
            group = groups.get(name, {})
            cells.append(number_cell(metric_text("auc", group.get("auc")), width_text(group.get("auc_half_width"))))
        rows.append(Row(tuple(cells)))
    return Table(tuple(headers), (tuple(rows),), caption=f"{task}: {split} AUC by {_TITLES[what]}")


def missing(family: Family, split: str, task: str) -> str:
    """Names the runs that were scored on the split before breakdowns were written."""
    labels = [r.label for r in family.runs if split in r.scores and task not in r.breakdowns.get(split, {})]
    return listed(labels)
