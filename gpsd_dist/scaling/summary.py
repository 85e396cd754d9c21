"""Does what `python -m gpsd_dist.scaling` was asked for, once its options are parsed: ladder or one-epoch figure."""

import argparse
import collections.abc
import contextlib
import dataclasses
import functools
import pathlib
import statistics
import typing

import rich.table

from gpsd_dist.checkpoint import integrity, storage
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.commands import environment, execute, shell
from gpsd_dist.disk.console import Console
from gpsd_dist.distributed.fork_server import start_server
from gpsd_dist.scaling import epochs, figures, runs
from gpsd_dist.scaling.fit import LAWS, MIN_SIZES, fit_law
from gpsd_dist.scaling.ladder import Trial


def ladder(args: argparse.Namespace, trials: list[Trial]) -> None:
    """Trains what is missing of a ladder, fits its laws, draws and prints them."""
    runs.check_unchanged(trials)
    name = f"scaling_{args.strategy.lower()}_{args.split}"
    path = args.out_dir / f"{name}.json"
    runs.check_nothing_is_lost(path, trials)  # fails now, not after hours of training
    points = []
    with start_server(environment()) or contextlib.nullcontext() as server:
        for number, trial in enumerate(trials, 1):
            runs.run_trial(trial, functools.partial(print, f"[{number}/{len(trials)}]", flush=True), server)
            points += runs.points_of(trial)
    fits, notes = fit_all(points)
    summary = {
        "strategy": args.strategy,
        "split": args.split,
        "points": points,
        "fits": {task: {m: fit and fit.as_dict() for m, fit in laws.items()} for task, laws in fits.items()},
        "notes": notes,
        "commands": [shell(command) for trial in trials for command in trial.commands],
    }
    storage.write_json(path, summary)
    title = f"{args.strategy}, {trials[0].finetuning.run.data_dir}, {args.split}"
    drawn = figures.save(figures.scaling_figure(points, fits, title), args.out_dir, name)
    _print(points, fits, notes, title)
    print("written: " + ", ".join(map(str, (path, *drawn))))


def fit_all(points: collections.abc.Sequence[dict[str, typing.Any]]) -> tuple[figures.Fits, list[str]]:
    """Fits every metric of every task; returns (task -> metric -> fit or None, notes for the reader)."""
    fits: figures.Fits = {task: {} for task in dict.fromkeys(point["task"] for point in points)}
    notes = []
    for task, laws in fits.items():
        for metric, law in LAWS.items():
            name = f"{task} {metric}"
            rows = [point for point in points if point["task"] == task]
            known = [row for row in rows if row[metric] is not None]
            if len(known) < len(rows):
                without = [f"{row['rung']} seed {row['seed']}" for row in rows if row[metric] is None]
                notes.append(f"{name}: left out, because the metric is undefined: {', '.join(without)}")
            fit = fit_law(law, [row["dense_parameters"] for row in known], [row[metric] for row in known])
            laws[metric] = fit
            if fit is None:
                sizes = len({row["dense_parameters"] for row in known})
                notes.append(f"{name}: no fit is possible with {sizes} distinct sizes; at least {MIN_SIZES} needed")
                continue
            notes += [f"{name}: not determined by these points: {what}" for what in fit.not_determined()]
            if fit.lack_of_fit_p() < 0.05:
                p = f"p = {fit.lack_of_fit_p():.3f}"
                notes.append(f"{name}: rungs leave the curve by more than seeds scatter ({p}): intervals too narrow")
    return fits, notes


def _print(points: list[dict[str, typing.Any]], fits: figures.Fits, notes: list[str], title: str) -> None:
    console = Console(width=120)
    for task, laws in fits.items():
        table = rich.table.Table("rung", "dense", "tower", "tables", "seeds", *laws, title=f"{title}: {task}")
        for rung in dict.fromkeys(point["rung"] for point in points):
            rows = [point for point in points if point["task"] == task and point["rung"] == rung]
            counts = [f"{rows[0][name]:,}" for name in ("dense_parameters", "tower_parameters", "table_parameters")]
            table.add_row(rung, *counts, str(len(rows)), *(_spread([row[m] for row in rows]) for m in laws))
        console.print(table)
    table = rich.table.Table("task", "fit", "c", "a", "b", "R^2", "largest rung - prediction", title="95 % intervals")
    for task, laws in fits.items():
        for fit in filter(None, laws.values()):
            values = fit.as_dict()
            left_out = values["largest_left_out"]
            error = "-" if left_out is None else f"{left_out['error']:+.4f}"
            cells = [f"{values[k]:.4g} ({low:.4g} - {high:.4g})" for k, (low, high) in fit.intervals().items()]
            table.add_row(task, fit.law.formula, *cells, f"{values['r2']:.3f}", error)
    if table.row_count:
        console.print(table)
    for note in notes:
        print(f"note: {note}")


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.4f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.4f} - {max(known):.4f})"


def epochs_figure(args: argparse.Namespace) -> None:
    """Draws the curves of finished runs over their epochs."""
    folders = list(dict.fromkeys(folder.resolve() for folder in args.epochs_figure))
    curves = [epochs.read_run(folder) for folder in folders]
    epochs.check_comparable(curves)
    if args.with_test_each_epoch:
        ends = [epochs.epoch_ends(run) for run in curves]  # all of them, before anything is scored
        curves = [_with_test(run, run_ends, args.out_dir) for run, run_ends in zip(curves, ends, strict=True)]
    path = args.out_dir / "epochs.json"
    storage.write_json(path, epochs.as_json(curves))
    drawn = figures.save(epochs.epochs_figure(curves), args.out_dir, "epochs")
    print("written: " + ", ".join(map(str, (path, *drawn))))


def _with_test(curves: epochs.RunCurves, ends: list[tuple[float, Location]], out_dir: pathlib.Path):
    """Adds test AUC at every epoch's end to a run's curves; keeps files that are newer than their checkpoint."""
    test_auc: dict[str, epochs.Curve] = {task: [] for task in curves.valid_auc}
    print(f"{curves.folder}: {len(ends)} looks at test; choose nothing by them", flush=True)
    for epoch, checkpoint in ends:
        command, result = epochs.scoring_command(curves, checkpoint, out_dir)
        if runs.read_result(result) is None or result.stat().st_mtime < integrity.saved_at_s(checkpoint):
            execute(command, say=functools.partial(print, flush=True))
        metrics = runs.read_result(result)
        for task, curve in test_auc.items():
            curve.append((epoch, metrics[task]["auc"]))
    return dataclasses.replace(curves, test_auc=test_auc)
