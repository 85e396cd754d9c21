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
from gpsd_dist.report import fit_summary
from gpsd_dist.report.fit_summary import FLOORS
from gpsd_dist.report.page import make_report
from gpsd_dist.report.tables import Table

REFITS = ("refit", "floor_refit")  # kinds of entries


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds what a fit found."""

    verdicts: dict[str, str]  # by task; the first is the one that counts
    hints: list[str]
    rows: list[dict[str, typing.Any]]  # of summary.json: one per trained model and task
    floors: list[dict[str, typing.Any]]
    refit: list[dict[str, typing.Any]]
    chosen: str
    commands: list[tuple[str, Command]]


def make(entries: list[Entry], chosen: Entry | None, facts: Facts, runner: Runner, args: argparse.Namespace) -> Outcome:
    """Judges all entries for every task."""
    verdicts, rows = {}, []
    advice: list[str] = []
    for task in facts.tasks:
        judged = judge(entries, task)
        best = next((one for one in judged if one.entry is chosen), None)
        verdicts[task] = verdict(task, best, judged, facts, is_short=bool(runner.cut or runner.left_out))
        floors = {is_refit: strongest_floor(judged, of_refit=is_refit) for is_refit in (False, True)}
        rows += [_row(one, task, floors[one.entry.kind in REFITS]) for one in judged if task in one.entry.test]
        if task == facts.tasks[0]:
            advice = [*_about_the_time(runner), *hints(task, best, judged, facts)]
    rows = sorted(rows, key=lambda row: [entry.label for entry in entries].index(row["label"]))
    kinds = (("model",), FLOORS, ("refit",))
    models, of_floors, refit = ([row for row in rows if row["kind"] in kind] for kind in kinds)
    label = chosen.label if chosen is not None else ""
    return Outcome(verdicts, advice, models, of_floors, refit, label, runner.commands)


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


def _row(one: Judged, task: str, floor: Judged | None) -> dict[str, typing.Any]:
    """Makes a line of summary.json: the metrics of `evaluate` on test, and what tells the entry from others."""
    entry = one.entry
    head = {"strategy": entry.strategy or entry.label, "task": task, "split": "test", "label": entry.label}
    width, difference = one.auc.half_width if one.auc is not None else math.nan, (math.nan, math.nan)
    if one.auc is not None and floor is not None and floor.auc is not None and one is not floor:
        difference = one.auc.minus(floor.auc)
    more = {"model": entry.model, "kind": entry.kind, "valid_auc": entry.valid_auc.get(task), "auc_half_width": width}
    more |= {"minus_floor": difference[0], "minus_floor_half_width": difference[1]}
    return head | entry.test.get(task, {}) | more


def show(made: Outcome, out_dir: pathlib.Path) -> None:
    """Prints tables, verdict and hints, and writes summary.json, commands.sh and report.html into `out_dir`."""
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    first = next(iter(made.verdicts.values()), "")
    parts = {"rows": made.rows, "floors": made.floors, "refit": made.refit, "chosen": made.chosen}
    summary = parts | {"verdict": first, "verdicts": made.verdicts, "next": made.hints}
    for table in fit_summary.tables(summary):
        console.print(as_text(table))
    console.print(fit_summary.CAPTION)
    for verdict_of_task in made.verdicts.values():
        console.print(verdict_of_task, style="bold", soft_wrap=True)
    for hint in made.hints:
        console.print(f"- {hint}", soft_wrap=True)
    storage.write_json(out_dir / "summary.json", summary)
    write(out_dir / "commands.sh", script(made.commands).encode())
    files = ["summary.json", "commands.sh"]
    if made.rows:
        report = make_report([out_dir])
        write(out_dir / "report.html", report.html.encode())
        files.append("report.html")
    console.print(f"in {out_dir}: {', '.join(files)}", soft_wrap=True)


def as_text(table: Table) -> rich.table.Table:
    """Draws a table for the terminal; its title is the first sentence of the caption."""
    shown = rich.table.Table(title=table.caption.split(".")[0], box=rich.box.SIMPLE_HEAD)
    for column in table.columns:
        shown.add_column(column.text, justify="right" if column.is_number else "left", no_wrap=True)
    for group in table.groups:
        for row in group:
            shown.add_row(*(cell.text for cell in row.cells), style="bold" if row.cells[0].is_strong else "")
        shown.add_section()
    return shown


def script(commands: list[tuple[str, Command]]) -> str:
    """Writes all commands so that they can be typed."""
    lines = ["# Every step of this fit as one would type it, in the folder where this fit was started."]
    for title, command in commands:
        lines += ["", f"# {title}", shell(command)]
    return "\n".join(lines) + "\n"
