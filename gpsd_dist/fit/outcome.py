"""Turns the entries of a fit into tables, a verdict, hints, and the files that hold them."""

import argparse
import collections.abc
import dataclasses
import math
import pathlib
import typing

import rich.box
import rich.table

from gpsd_dist.checkpoint import storage
from gpsd_dist.commands import Command, shell
from gpsd_dist.disk.console import Console
from gpsd_dist.disk.writing import write
from gpsd_dist.fit.data_check import Facts
from gpsd_dist.fit.steps import Runner
from gpsd_dist.fit.verdict import Entry, Judged, hints, judge, strongest_floor, verdict
from gpsd_dist.report.page import Summary, make_report
from gpsd_dist.report.tables import MISSING, Cell, Row, Table, metric_text, number_cell

COLUMNS = ("", "valid AUC", "test AUC", "- floor", "GAUC", "log loss")
FLOORS, REFITS = ("floor", "floor_refit"), ("refit", "floor_refit")  # kinds of entries
CAPTION = (
    "+- is half of a 95 % interval over the users of test; another seed of the training is not covered. The choice was "
    "made on valid; test was scored after it. refit: made again on train + valid. '- floor' is the difference from the "
    "strongest line of the upper part, for a refit from the strongest with refitted trees."
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds what a fit found."""

    verdicts: dict[str, str]  # by task; the first is the one that counts
    hints: list[str]
    tables: list[Table]  # one per task
    rows: list[dict[str, typing.Any]]  # of summary.json: one per trained model and task
    floors: list[dict[str, typing.Any]]
    refit: list[dict[str, typing.Any]]
    chosen: str
    commands: list[tuple[str, Command]]


def make(entries: list[Entry], chosen: Entry | None, facts: Facts, runner: Runner, args: argparse.Namespace) -> Outcome:
    """Judges all entries for every task."""
    verdicts, tables, rows = {}, [], []
    advice: list[str] = []
    for task in facts.tasks:
        judged = judge(entries, task)
        best = next((one for one in judged if one.entry is chosen), None)
        verdicts[task] = verdict(task, best, judged, facts, is_short=bool(runner.cut or runner.left_out))
        tables.append(_table(task, judged, best))
        rows += [_row(one, task) for one in judged if task in one.entry.test]
        if task == facts.tasks[0]:
            advice = [*_about_the_time(runner), *hints(task, best, judged, facts)]
    rows = sorted(rows, key=lambda row: [entry.label for entry in entries].index(row["label"]))
    kinds = (("model",), FLOORS, ("refit",))
    models, floors, refit = ([row for row in rows if row["kind"] in kind] for kind in kinds)
    label = chosen.label if chosen is not None else ""
    return Outcome(verdicts, advice, tables, models, floors, refit, label, runner.commands)


def _about_the_time(runner: Runner) -> collections.abc.Iterator[str]:
    """Yields hints about trainings that ended too early."""
    if runner.cut:
        yield f"--budget_minutes ended {', '.join(runner.cut)} early: delete those folders and run again without it"
    if runner.left_out:
        least = runner.budget.least_minutes
        at_least = f" (--budget_minutes {least} or more)" if least else ""
        names = ", ".join(runner.left_out)
        yield f"--budget_minutes left out {names}: the same command goes on with them, given time{at_least}"
    for prefix, is_pretraining in (("--gin", False), ("--pretrain_gin", True)):
        rising = [(name, state) for name, state in runner.rising if (name == "pretraining") == is_pretraining]
        if rising:
            epochs = 2 * max(state.run_config["train"]["epochs"] for _, state in rising)
            names = ", ".join(dict.fromkeys(name for name, _ in rising))
            yield f"{names}: the last validation was the best; try {prefix}.EPOCHS={epochs} with another --out"


def _row(one: Judged, task: str) -> dict[str, typing.Any]:
    """Makes a line of summary.json: the metrics of `evaluate` on test, and what tells the entry from others."""
    entry = one.entry
    head = {"strategy": entry.strategy or entry.label, "task": task, "split": "test", "label": entry.label}
    width = one.auc.half_width if one.auc is not None else math.nan
    more = {"model": entry.model, "kind": entry.kind, "valid_auc": entry.valid_auc.get(task), "auc_half_width": width}
    return head | entry.test[task] | more


def _table(task: str, judged: list[Judged], best: Judged | None) -> Table:
    floors = {is_refit: strongest_floor(judged, of_refit=is_refit) for is_refit in (False, True)}
    lines = [(one, Row(tuple(_cells(one, task, floors[one.entry.kind in REFITS], one is best)))) for one in judged]
    kinds = (FLOORS, ("model", "refit"))
    groups = tuple(tuple(row for one, row in lines if one.entry.kind in kind) for kind in kinds)
    return Table((Cell(COLUMNS[0]), *map(number_cell, COLUMNS[1:])), groups, caption=f"{task}. {CAPTION}")


def _cells(one: Judged, task: str, floor: Judged | None, is_best: bool) -> list[Cell]:
    test, cells = one.entry.test.get(task, {}), [Cell(one.entry.label, is_strong=is_best)]
    valid = one.entry.valid_auc.get(task)
    cells.append(number_cell(MISSING if valid is None or math.isnan(valid) else f"{valid:.4f}"))
    auc = MISSING if one.auc is None else f"{one.auc.auc:.4f} +- {one.auc.half_width:.3f}"
    cells.append(number_cell(auc, is_strong=is_best))
    difference = MISSING
    if one.auc is not None and floor is not None and floor.auc is not None and one is not floor:
        difference = "{:+.4f} +- {:.3f}".format(*one.auc.minus(floor.auc))
    cells.append(number_cell(difference))
    return [*cells, *(number_cell(metric_text(name, test.get(name))) for name in ("gauc", "log_loss"))]


def show(made: Outcome, out_dir: pathlib.Path) -> None:
    """Prints tables, verdict and hints, and writes summary.json, commands.sh and report.html into `out_dir`."""
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    for table in made.tables:
        console.print(_as_text(table))
    console.print(CAPTION)
    for verdict_of_task in made.verdicts.values():
        console.print(verdict_of_task, style="bold", soft_wrap=True)
    for hint in made.hints:
        console.print(f"- {hint}", soft_wrap=True)
    first = next(iter(made.verdicts.values()), "")
    parts = {"rows": made.rows, "floors": made.floors, "refit": made.refit, "chosen": made.chosen}
    written = {"verdict": first, "verdicts": made.verdicts, "next": made.hints}
    storage.write_json(out_dir / "summary.json", parts | written)
    write(out_dir / "commands.sh", _script(made.commands).encode())
    words = Summary(tuple(made.verdicts.values()), tuple(made.tables), tuple(made.hints))
    files = ["summary.json", "commands.sh"]
    if made.rows:
        report = make_report([out_dir], words)
        write(out_dir / "report.html", report.html.encode())
        files.append("report.html")
    console.print(f"in {out_dir}: {', '.join(files)}", soft_wrap=True)


def _as_text(table: Table) -> rich.table.Table:
    shown = rich.table.Table(title=table.caption.split(".")[0], box=rich.box.SIMPLE_HEAD)
    for column in table.columns:
        shown.add_column(column.text, justify="right" if column.is_number else "left", no_wrap=True)
    for group in table.groups:
        for row in group:
            shown.add_row(*(cell.text for cell in row.cells), style="bold" if row.cells[0].is_strong else "")
        shown.add_section()
    return shown


def _script(commands: list[tuple[str, Command]]) -> str:
    lines = ["# Every step of this fit as one would type it, in the folder where this fit was started."]
    for title, command in commands:
        lines += ["", f"# {title}", shell(command)]
    return "\n".join(lines) + "\n"
