"""Shows what `fit --daily` found, from its `daily.json`: the verdict, figures by day scored and by age of a model."""

import collections.abc
import dataclasses
import math
import typing

from gpsd_dist.report.curves import Figure, range_of
from gpsd_dist.report.figures import MIN_SPAN, Points, group_figure
from gpsd_dist.report.tables import MISSING, Cell, Row, Table, metric_text, number_cell

SCRATCH, WARM = "from scratch", "warm start"
COLUMNS = ("", "AUC", "GAUC", "GAUC by day", "log loss", "pred. / obs.", "CPU s")
CAPTION = (
    "Each model is trained to the end of a day (UTC) and scored on the next. Lines of several days: mean of the days' "
    "AUCs, +- half of a 95 % interval over users; GAUC of a user over all days, and by user and day; CPU seconds per "
    "training. N days old: AUC against a model that is one day old, on the same days."
)
_MOST_LABELS = 20  # of an axis; more would not be read
_LEAST_RATES = (0.9, 1.1)  # of predicted / observed on an axis
_BY = {"day": "day", "trained_to": "day", "age_days": "age"}
_INTERVAL = "line: 95 % interval over users"

_Lines = collections.abc.Sequence[dict[str, typing.Any]]


@dataclasses.dataclass(frozen=True)
class TaskDays:
    """Holds the figures and the table of one task."""

    task: str
    legend: tuple[tuple[Points, tuple[()]], ...]
    figures: tuple[Figure, ...]
    table: Table


@dataclasses.dataclass(frozen=True)
class EveryDay:
    """Holds what the page says about one folder of `fit --daily`."""

    name: str
    verdict: str
    notes: tuple[str, ...]
    tasks: tuple[TaskDays, ...]


def every_day(name: str, record: dict[str, typing.Any], number: int) -> EveryDay:
    """Reads the content of a `daily.json`, the n-th of the page. ValueError if it has another form."""
    try:
        tasks = tuple(
            TaskDays(task, *_drawn(lines, f"days-{number}-{index}", with_cpu=not index), table(task, lines))
            for index, (task, lines) in enumerate(record.get("lines", {}).items())
        )
        return EveryDay(name, str(record["verdict"]), tuple(map(str, record.get("notes", []))), tasks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}/daily.json: not what fit --daily writes ({error!r})") from error


def table(task: str, lines: _Lines) -> Table:
    """Makes the table of a task: means over days, each day, each age."""
    groups = ([line for line in lines if line["of"] == of] for of in ("all days", "day", "age"))
    rows = tuple(tuple(map(_row, group)) for group in groups)
    return Table((Cell(""), *map(number_cell, COLUMNS[1:])), rows, caption=f"{task}. {CAPTION}")


def _row(line: dict[str, typing.Any]) -> Row:
    label, auc = line["label"], _text(line, "auc")
    if line["of"] == "all days":
        auc += width_words(_number(line, "auc_half_width"))
    elif line["of"] == "day":
        label = f"{line['day']} {label}"
    else:
        label = f"{label}, {line['age_days']} day{'s' * (line['age_days'] > 1)} old"
        if line["age_days"] > 1 and not math.isnan(lost := _number(line, "auc_lost")):
            auc += f" ({-lost:+.4f}{width_words(_number(line, 'auc_lost_half_width'))})"
    others = [number_cell(_text(line, name)) for name in ("gauc", "gauc_user_day", "log_loss", "calibration")]
    cpu_s = _number(line, "cpu_s")
    return Row((Cell(label), number_cell(auc), *others, number_cell(MISSING if math.isnan(cpu_s) else f"{cpu_s:.1f}")))


def width_words(half_width: float) -> str:
    """Writes " +- 0.0041"; nothing for rows of one user, which have no interval."""
    return "" if math.isnan(half_width) else f" +- {half_width:.4f}"


def _number(line: dict[str, typing.Any], name: str) -> float:
    """Returns a number of the file; NaN where it says null, or has none."""
    return math.nan if line.get(name) is None else float(line[name])


def _text(line: dict[str, typing.Any], name: str) -> str:
    return MISSING if math.isnan(value := _number(line, name)) else metric_text(name, value)


def _drawn(
    lines: _Lines, prefix: str, *, with_cpu: bool
) -> tuple[tuple[tuple[Points, tuple[()]], ...], tuple[Figure, ...]]:
    """Draws the figures of one task. Returns the legend, which is of all of them, and the figures."""
    by_day, by_age = ([line for line in lines if line["of"] == of] for of in ("day", "age"))
    style = {label: index for index, label in enumerate(dict.fromkeys(line["label"] for line in lines))}

    def draw(of: _Lines, by: str, metric: str, words: str, note: str, x_label: str, **limits: typing.Any) -> Figure:
        groups = list(dict.fromkeys(line[by] for line in of))
        every = math.ceil(len(groups) / _MOST_LABELS)
        names = [f"{group}" if n % every == 0 else "" for n, group in enumerate(groups)]
        rows, title = _points(of, by, groups, metric, style), f"{words} by {_BY[by]}"
        svg = group_figure(names, rows, f"{prefix}-{metric}", title, y_label=words, x_label=x_label, **limits)
        return Figure(title, svg, note)

    day, age = "day scored (UTC)", "age of the model in days"
    figures = [draw(by_day, "day", "auc", "AUC", _INTERVAL, day)] if by_day else []
    if by_age:
        against, lost = f"against a model that is one day old, on the same days; {_INTERVAL}", _range_of_loss(by_age)
        figures.append(draw(by_age, "age_days", "auc_lost", "AUC lost", against, age, y_range=lost, level=0.0))
        note, rates = "1: what is predicted happens that often", [_number(line, "calibration") for line in by_age]
        rate = range_of([*_LEAST_RATES, *rates])
        figures.append(
            draw(by_age, "age_days", "calibration", "predicted / observed", note, age, y_range=rate, level=1.0)
        )
    longest_s = max((s for line in by_day if math.isfinite(s := _number(line, "cpu_s"))), default=0.0)
    if with_cpu and longest_s:
        note, y_range = "of the training, for all tasks together", (0.0, 1.05 * longest_s)
        trainings = [line for line in by_day if not math.isnan(_number(line, "cpu_s"))]
        x_label = "trained to the end of (UTC)"
        figures.append(draw(trainings, "trained_to", "cpu_s", "CPU seconds", note, x_label, y_range=y_range))
    return tuple((Points(label, (), (), index), ()) for label, index in style.items()), tuple(figures)


def _points(lines: _Lines, by: str, groups: list[typing.Any], metric: str, style: dict[str, int]) -> list[Points]:
    rows = []
    for label, index in style.items():
        known = {line[by]: line for line in lines if line["label"] == label}
        values, half_widths = (
            tuple(_number(known.get(group, {}), name) for group in groups) for name in (metric, f"{metric}_half_width")
        )
        if any(map(math.isfinite, values)):
            rows.append(Points(label, values, half_widths, index))
    return rows


def _range_of_loss(by_age: _Lines) -> tuple[float, float]:
    """Spans what an axis of these AUCs would span at least: on its own scale a loss of 0.001 would fill the figure."""
    ends = [0.0]
    for line in by_age:
        lost, half_width = _number(line, "auc_lost"), _number(line, "auc_lost_half_width")
        ends += [end for end in (lost - half_width, lost + half_width) if math.isfinite(end)]
    least = MIN_SPAN * max((auc for line in by_age if math.isfinite(auc := _number(line, "auc"))), default=1.0)
    low, high = min(ends), max(ends)
    return low - 0.1 * least, max(high + 0.1 * least, low + least)
