"""Finds the curves of a family of runs and draws them: training, validation, generalization gap, speed."""

import dataclasses
import math
import typing

from gpsd_dist.report.beside import Floor
from gpsd_dist.report.families import Family, seed_text
from gpsd_dist.report.figures import Dots, Line, line_figure, strip_figure
from gpsd_dist.report.intervals import half_width_of, mean_width, value_of
from gpsd_dist.report.run_folder import Run
from gpsd_dist.report.tables import listed

VALID_METRICS = {"auc": "AUC", "gauc": "GAUC", "gauc_user_day": "GAUC by day", "log_loss": "log loss"}
VALID_METRICS |= {name: name.upper() for name in ("mrr", "hr@10", "ndcg@10")}

_EQUAL_EPOCHS = 1.01  # steps per epoch differ by less where only the last batch does


@dataclasses.dataclass(frozen=True)
class Figure:
    """Holds a drawing, and the text above and below it."""

    title: str
    svg: str
    note: str = ""


def tasks(runs: typing.Iterable[Run]) -> list[str]:
    """Lists tasks that were validated or scored, in the order in which they first occur."""
    found: dict[str, None] = {}
    for run in runs:
        names = [name.removeprefix("valid/") for name in run.names() if name.startswith("valid/")]
        for name in [*run.best_metrics, *names]:
            found.setdefault(name.rpartition("/")[0])
        for scores in run.scores.values():
            found.update(dict.fromkeys(scores))
    return [task for task in found if task]


def training_figures(family: Family) -> list[Figure]:
    """Draws loss, validation metrics and learning rate by step."""
    names = {"train/loss": "training loss"}
    parts = _names(family, "train/", "_loss")
    if len(parts) > 1:
        names |= {part: f"training loss, {part[len('train/') : -len('_loss')]}" for part in parts}
    figures = [_by_step(family, name, title) for name, title in names.items()]
    for task in tasks(family.runs):
        for metric, word in VALID_METRICS.items():
            figures.append(_by_step(family, f"valid/{task}/{metric}", f"valid {word}, {task}", is_validation=True))
    figures.append(_by_step(family, "train/dense_lr", "learning rate of the tower"))
    return [figure for figure in figures if figure is not None]


def gap_figures(family: Family) -> list[Figure]:
    """Draws valid log loss minus training loss by epoch, one figure per task."""
    figures = []
    for task in tasks(family.runs):
        name = f"gap/{task}_log_loss"
        lines = _lines(family, name, x="epoch", is_validation=True)
        if lines:
            title = f"generalization gap, {task}"
            svg = line_figure(lines, slug(family, name), f"{title} by epoch", x_label="epoch", zero_line=True)
            figures.append(Figure(title, svg, _absent(family, name)))
    return figures


def loss_pairs(family: Family) -> list[list[Figure]]:
    """Draws training and valid log loss by epoch: per task, one small figure per configuration on one scale."""
    return [figures for task in tasks(family.runs) if (figures := _pairs_of_task(family, task))]


def _pairs_of_task(family: Family, task: str) -> list[Figure]:
    drawn = []
    for configuration in family.configurations:
        lines = [line for run in configuration.runs for line in _pair(run, task, configuration.style_index)]
        if lines:
            drawn.append((configuration, lines))
    y_range = range_of([value for _, lines in drawn for line in lines for value in line.y])
    figures = []
    for configuration, lines in drawn:
        title = f"{task}: {configuration.label}"
        name = slug(family, f"pair-{task}-{configuration.style_index}")
        described = f"training and valid log loss by epoch, {title}"
        svg = line_figure(lines, name, described, x_label="epoch", y_range=y_range, is_small=True)
        figures.append(Figure(title, svg))
    return figures


def _pair(run: Run, task: str, style_index: int) -> list[Line]:
    """Makes lines of both losses; none if one is missing, or if ESMM trained the task on another quantity."""
    train, valid = run.series(f"train/{task}_loss", "epoch"), run.series(f"valid/{task}/log_loss", "epoch")
    finetune = run.config.get("finetune")
    is_esmm = isinstance(finetune, dict) and bool(finetune.get("esmm"))
    if not train or not valid or (is_esmm and not run.series(f"gap/{task}_log_loss")):
        return []
    return [
        Line(f"{run.label}: training", *_columns(train), is_muted=True),
        Line(f"{run.label}: valid", *_columns(valid), style_index=style_index, has_markers=True),
    ]


def speed_figure(family: Family) -> Figure | None:
    """Draws tokens per second by step."""
    return _by_step(family, "perf/tokens_per_s", f"history tokens per second, {family.title}")


def strip(family: Family, floors: typing.Sequence[Floor], task: str, metric: str, split: str) -> Figure | None:
    """Draws the seeds of every configuration as dots, and floors; None if there is nothing to compare."""
    rows = []
    for configuration in family.configurations:
        values = [value_of(run, split, task, metric) for run in configuration.runs]
        finite = tuple(value for value in values if value is not None and math.isfinite(value))
        if finite:
            widths = [half_width_of(run, split, task, metric) for run in configuration.runs]
            rows.append(Dots(configuration.label, finite, configuration.style_index, mean_width(widths)))
    for floor in floors:
        value = value_of(floor, split, task, metric)
        if value is not None and math.isfinite(value):
            width = half_width_of(floor, split, task, metric)
            rows.append(Dots(floor.label, (value,), half_width=width or math.nan, is_muted=True))
    if len(rows) < 2:
        return None
    word = VALID_METRICS.get(metric, metric)
    title = f"{split} {word}, {task}"
    described = f"{title}, by configuration and seed"
    svg = strip_figure(rows, slug(family, f"strip-{split}-{task}-{metric}"), described, x_label=f"{split} {word}")
    grey = "; grey: needs no model" if any(row.is_muted for row in rows) else ""
    return Figure(title, svg, f"dot: one seed; bar: mean; line: 95 % interval over users{grey}")


def x_axis(family: Family) -> str:
    """Says along which axis the runs compare: "step", or "epoch" where a step is not the same share of the data."""
    lengths = [length for run in family.runs if (length := run.steps_per_epoch)]
    return "epoch" if lengths and max(lengths) > _EQUAL_EPOCHS * min(lengths) else "step"


def _by_step(family: Family, name: str, title: str, is_validation: bool = False) -> Figure | None:
    x = x_axis(family)
    lines = _lines(family, name, x, is_validation=is_validation)
    if not lines:
        return None
    svg = line_figure(lines, slug(family, name), f"{title} by {x}", x_label=x)
    return Figure(title, svg, _absent(family, name))


def _lines(family: Family, name: str, x: str = "step", is_validation: bool = False) -> list[Line]:
    """Makes a line per run that has the metric: colour by configuration, dashes by seed."""
    lines = []
    for configuration in family.configurations:
        for dash_index, run in enumerate(configuration.runs):
            points = run.series(name, x)
            if not any(math.isfinite(value) for _, value in points):
                continue
            label = f"{configuration.label}, seed {seed_text(run)} ({run.label})"
            lines.append(
                Line(
                    label,
                    *_columns(points),
                    style_index=configuration.style_index,
                    dash_index=dash_index,
                    has_markers=is_validation,
                    ring_x=_best_x(run, points, x) if is_validation else None,
                    is_stopped=run.is_stopped_early,
                )
            )
    return lines


def _best_x(run: Run, points: typing.Sequence[tuple[float, float]], x: str) -> float | None:
    """Returns the point of the best step on the axis."""
    if x == "step" or run.best_step is None or not run.steps_per_epoch:
        return run.best_step
    best = run.best_step / run.steps_per_epoch
    return min((x for x, _ in points), key=lambda x: abs(x - best), default=None)


def _columns(points: typing.Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Splits points into x and y; a value that is not finite becomes NaN, which breaks a line."""
    return tuple(x for x, _ in points), tuple(y if math.isfinite(y) else math.nan for _, y in points)


def range_of(values: typing.Sequence[float]) -> tuple[float, float] | None:
    """Spans the finite values and a margin; None if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    margin = 0.05 * (max(finite) - min(finite)) or 0.05
    return min(finite) - margin, max(finite) + margin


def _names(family: Family, prefix: str, suffix: str) -> list[str]:
    names = {name for run in family.runs for name in run.names()}
    return sorted(name for name in names if name.startswith(prefix) and name.endswith(suffix))


def _absent(family: Family, name: str) -> str:
    """Names the runs that did not record the metric, but should have."""
    is_of_valid = name.startswith(("valid/", "gap/"))
    runs = [run for made in family.configurations if not (made.is_refit and is_of_valid) for run in made.runs]
    absent = [run.label for run in runs if not any(math.isfinite(value) for _, value in run.series(name))]
    return f"not recorded by {listed(absent)}" if absent else ""


def slug(family: Family, name: str) -> str:
    """Makes a valid id that is unique on the page."""
    return f"{family.anchor}-" + "".join(c if c.isalnum() else "-" for c in name)
