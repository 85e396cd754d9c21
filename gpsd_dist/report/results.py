"""Makes the strategy tables: metrics of every configuration (mean and range over seeds) and of every run."""

import dataclasses
import math
import statistics
import typing

from gpsd_dist.report import curves, groups
from gpsd_dist.report.beside import Floor
from gpsd_dist.report.curves import tasks
from gpsd_dist.report.families import Configuration, Family, model_text, refits, seed_text, strategy_text
from gpsd_dist.report.intervals import half_width_of, mean_width, value_of, width_text
from gpsd_dist.report.judgement import Judgement, judge
from gpsd_dist.report.run_folder import Run
from gpsd_dist.report.tables import (
    MISSING,
    Cell,
    Row,
    Table,
    best_index,
    count_text,
    mean_cell,
    metric_text,
    number_cell,
)

_RANKING_METRICS = ("mrr", "hr@10", "hr@100", "ndcg@10", "ndcg@100")
MAIN_METRICS = ("auc", "gauc", "gauc_user_day", "log_loss", "ne", "calibration", *_RANKING_METRICS)
SPLIT_ORDER = ("valid", "test", "holdout")
STATES = {True: "finished", False: "not finished", None: "no checkpoint"}
_STRIP_METRICS = ("auc", "gauc", "gauc_user_day", "log_loss", "mrr", "hr@10", "ndcg@10")
_METRIC_WORDS = curves.VALID_METRICS | {"ne": "NE", "hr@100": "HR@100", "ndcg@100": "NDCG@100"}


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Holds the tables and figures of one task of a family."""

    task: str
    split: str  # that is judged
    summary: Table
    strips: tuple[curves.Figure, ...]
    every_run: Table
    highlight: "Highlight | None"
    calibration: curves.Figure | None
    groups: tuple[tuple[curves.Figure | None, Table], ...]
    without_groups: str  # runs that were scored before breakdowns were written


@dataclasses.dataclass(frozen=True)
class Highlight:
    """Names the configuration that `valid` would choose."""

    what: str
    configuration: str
    value: str
    width: str
    note: str
    judgement: Judgement


def task_results(family: Family, floors: typing.Sequence[Floor] = ()) -> list[TaskResult]:
    """Makes one entry per task, in the order of the files."""
    results = []
    for task in tasks(family.runs):
        columns = _columns(family, task)
        if not columns:
            continue
        metric = next((m for m in ("auc", "mrr") if any(column[1] == m for column in columns)), columns[0][1])
        splits = [split for split, name in columns if name == metric]
        split = next((s for s in splits if s != "valid"), splits[0])
        drawn = [m for s, m in columns if s == split and m in _STRIP_METRICS]
        strips = [curves.strip(family, floors, task, m, split) for m in drawn]
        results.append(
            TaskResult(
                task=task,
                split=split,
                summary=_summary(family, floors, task, columns),
                strips=tuple(strip for strip in strips if strip is not None),
                every_run=_every_run(family, task, columns),
                highlight=_highlight(family, floors, task, metric, splits),
                calibration=groups.calibration(family, floors, split, task),
                groups=tuple(groups.group_results(family, floors, split, task)),
                without_groups=groups.missing(family, split, task),
            )
        )
    return results


def _columns(family: Family, task: str) -> list[tuple[str, str]]:
    """Lists every known (split, metric) of the task: splits in their order, main metrics first."""
    known: dict[tuple[str, str], None] = {}
    for run in family.runs:
        for split in {*run.scores, "valid"}:
            best = {name.rpartition("/")[2]: 0 for name in run.best_metrics if name.rpartition("/")[0] == task}
            values = run.scores[split].get(task, {}) if split in run.scores else best
            known.update(dict.fromkeys((split, metric) for metric in values))
    return sorted(known, key=lambda column: (*_rank(SPLIT_ORDER, column[0]), *_rank(MAIN_METRICS, column[1])))


def _rank(order: tuple[str, ...], name: str) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _spans(num_before: int, columns: list[tuple[str, str]]) -> tuple[tuple[str, int], ...]:
    splits = list(dict.fromkeys(split for split, _ in columns))
    counts = [(split, sum(column[0] == split for column in columns)) for split in splits]
    return (("", num_before), *((f"{s} (best step)" if s == "valid" else s, count) for s, count in counts))


def _values(configuration: Configuration, task: str, column: tuple[str, str]) -> list[float | None]:
    return [value_of(run, column[0], task, column[1]) for run in configuration.runs]


def _mean(values: list[float | None]) -> float | None:
    """Averages over seeds; None unless every seed has a value, because means over different seeds do not compare."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _summary(family: Family, floors: typing.Sequence[Floor], task: str, columns: list[tuple[str, str]]) -> Table:
    """Makes one row per configuration, then one per floor; the best mean of a column is bold."""
    shown = [column for column in columns if column[1] in MAIN_METRICS] or columns
    configurations = family.configurations
    best = {c: best_index(c[1], [_mean(_values(made, task, c)) for made in configurations]) for c in shown}
    rows = []
    for index, made in enumerate(configurations):
        cells = [Cell(made.label, style_index=made.style_index), Cell(made.seeds)]
        cells += [_mean_cell(made, task, c, is_strong=best[c] == index) for c in shown]
        rows.append(Row(tuple(cells)))
    of_floors = []
    for floor in floors:
        values = [value_of(floor, split, task, metric) for split, metric in shown]
        # Popularity is no probability and so has no log loss, which is no sign of a broken run.
        values = [None if value is None or math.isnan(value) else value for value in values]
        if any(value is not None for value in values):
            widths = [width_text(half_width_of(floor, split, task, metric)) for split, metric in shown]
            numbers = (number_cell(metric_text(c[1], v), w) for c, v, w in zip(shown, values, widths, strict=True))
            of_floors.append(Row((Cell(floor.label, "no model"), Cell(""), *numbers)))
    headers = (Cell("configuration"), Cell("seeds"), *(number_cell(_METRIC_WORDS.get(m, m)) for _, m in shown))
    groups_of_rows = (tuple(rows), tuple(of_floors)) if of_floors else (tuple(rows),)
    caption = f"{task}: mean over seeds; below it 95 % interval over users, smallest to largest seed"
    return Table(headers, groups_of_rows, _spans(2, shown), caption)


def _mean_cell(made: Configuration, task: str, column: tuple[str, str], *, is_strong: bool) -> Cell:
    """Writes the mean over seeds with its interval and range."""
    cell = mean_cell(column[1], _values(made, task, column), is_strong=is_strong)
    if cell.text in (MISSING, "NaN"):
        return cell
    width = width_text(mean_width([half_width_of(run, column[0], task, column[1]) for run in made.runs]))
    return dataclasses.replace(cell, note="\n".join(filter(None, (width, cell.note))))


def _every_run(family: Family, task: str, columns: list[tuple[str, str]]) -> Table:
    """Makes one row per run with every metric; a configuration of several seeds ends with its mean."""
    groups = []
    for made in family.configurations:
        rows = []
        for run in made.runs:
            values = (number_cell(metric_text(metric, value_of(run, split, task, metric))) for split, metric in columns)
            rows.append(Row((*_who(run, family), *values)))
        if len(made.runs) > 1:
            first = Cell(f"mean of {len(made.runs)}", style_index=made.style_index)
            who = (first, *(cell for cell in _who(made.runs[0], family)[1:4]), Cell(made.seeds))
            means = (mean_cell(c[1], _values(made, task, c)) for c in columns)
            rows.append(Row((*who, Cell(""), Cell(""), *means), is_mean=True))
        groups.append(tuple(rows))
    names = ("run", "stage", "strategy", "model", "seed", "state")
    headers = (*map(Cell, names), number_cell("best step"), *(number_cell(_METRIC_WORDS.get(m, m)) for _, m in columns))
    return Table(headers, tuple(groups), _spans(7, columns), f"{task}: every run")


def _who(run: Run, family: Family) -> tuple[Cell, ...]:
    best = MISSING if run.best_step is None else count_text(run.best_step)
    strategy = MISSING if family.stage == "pretrain" else strategy_text(run)
    words = (
        run.label,
        family.stage or "?",
        strategy,
        model_text(run),
        seed_text(run),
        STATES.get(run.is_finished, "?"),
    )
    return (*map(Cell, words), number_cell(best))


def _highlight(
    family: Family, floors: typing.Sequence[Floor], task: str, metric: str, splits: typing.Sequence[str]
) -> Highlight | None:
    """Chooses a configuration by its mean on `valid` and shows its mean on the scored split: test decides nothing.

    If it was not scored itself, but its refit on more data was, the refit's score is shown.
    """
    means = [_mean(_values(made, task, ("valid", metric))) for made in family.configurations]
    known = [index for index, mean in enumerate(means) if mean is not None and math.isfinite(mean)]
    if not known and len(family.configurations) > 1:
        return None
    index = best_index(metric, means)
    chosen = family.configurations[index if index is not None else known[0] if known else 0]
    candidates = [made for made in (chosen, refits(chosen, family.configurations)) if made is not None]
    shown, split = next(
        (
            (made, s)
            for made in candidates
            for s in splits
            if s != "valid" and _mean(_values(made, task, (s, metric))) is not None
        ),
        (chosen, "valid"),
    )
    values = _values(shown, task, (split, metric))
    if _mean(values) is None:
        return None
    num_seeds = len(values)
    note = f"mean of {num_seeds} seeds" if num_seeds > 1 else "one seed"
    if len(family.configurations) > 1:
        note += f"; best of {len(known)} on valid"
    word = _METRIC_WORDS.get(metric, metric)
    width = width_text(mean_width([half_width_of(run, split, task, metric) for run in shown.runs]))
    judged = judge(family, shown, floors, split, task, metric, word)
    value = metric_text(metric, _mean(values))
    return Highlight(f"{task}, {split} {word}", shown.label, value, width, note, judged)
