"""Draws the one-epoch figure: validation AUC and generalisation gap over epochs, by strategy (arXiv:2506.03699).

The curves come from `metrics.jsonl` of finished or running runs; nothing is scored here. The gap is log loss on `valid`
minus mean training loss since the last validation. Where training changes the tables, it opens after the first epoch.
"""

import collections
import collections.abc
import dataclasses
import math
import pathlib
import re
import typing

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gpsd_dist.checkpoint import manager, retention
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.commands import Command
from gpsd_dist.config import STRATEGIES
from gpsd_dist.config.model import size_text
from gpsd_dist.metrics.recorder import JSONL_NAME
from gpsd_dist.report import run_folder
from gpsd_dist.scaling.figures import panels

_VALID_AUC = re.compile(r"valid/(.+)/auc")
_COLORS = dict(zip(STRATEGIES, ("#4d4d4d", "#d98c1f", "#b8338a", "#1f5fa8", "#2a8f4f"), strict=True))
_STYLES = ("-", "--", ":", "-.")
Curve = list[tuple[float, float]]  # (epoch, value) by epoch


@dataclasses.dataclass(frozen=True)
class RunCurves:
    """Holds what one run reported while it trained."""

    folder: pathlib.Path
    options: dict[str, typing.Any]  # `run_config.json` unchecked: runs of older versions can be drawn, too
    valid_auc: dict[str, Curve]  # by task
    gap: dict[str, Curve]  # by task: log loss on valid - in training; empty where they do not compare (ESMM)
    steps: list[tuple[float, int]]  # (epoch, step) of every validation
    test_auc: dict[str, Curve] = dataclasses.field(default_factory=dict)  # empty unless all epochs were scored

    @property
    def strategy(self) -> str:
        return self.options["strategy"]

    @property
    def label(self) -> str:
        """Names strategy and model: the figure averages runs of one label over their seeds."""
        model = self.options["model"]
        size = size_text(model).lower()
        return f"{self.strategy} {size}" + ("" if model["name"] == "transformer" else f" {model['name']}")


def read_run(folder: pathlib.Path) -> RunCurves:
    """Reads the curves of a run. ValueError if it is not a finetuning run or has not validated yet."""
    run = run_folder.read_run(folder, folder.name)
    if not run.config or not (folder / JSONL_NAME).is_file():
        raise ValueError(f"{folder} is not a run folder: run_config.json and {JSONL_NAME} expected")
    broken = [problem for problem in run.problems if problem.endswith(run_folder.NOT_JSON)]
    if broken:
        raise ValueError(f"{broken[0].removesuffix(', left out')}; remove it, or leave this run out")
    if run.config["stage"] != "finetune":
        raise ValueError(f"{folder} is a {run.config['stage']} run; the figure is about finetuning runs")
    validations = [entry for entry in run.entries if any(map(_VALID_AUC.fullmatch, entry))]
    if not validations:
        raise ValueError(f"{folder} has no validation in {JSONL_NAME}: just started, or a refit (REFIT_OF)?")
    tasks = [match[1] for match in map(_VALID_AUC.fullmatch, validations[0]) if match]
    auc = {task: run.series(f"valid/{task}/auc", "epoch") for task in tasks}
    steps = [(entry["epoch"], int(entry["step"])) for entry in validations]
    return RunCurves(folder, run.config, auc, {t: run.series(f"gap/{t}_log_loss", "epoch") for t in tasks}, steps)


def epoch_ends(curves: RunCurves) -> list[tuple[float, Location]]:
    """Finds (epoch, checkpoint) of every epoch's last validation. ValueError if a checkpoint is not kept any more."""
    last = {math.ceil(epoch - 1e-9): (epoch, step) for epoch, step in curves.steps}
    complete = retention.complete(manager.checkpoint_folder(curves.folder))
    there = {place[0]: path for path in complete if (place := retention.place_of(path))}
    gone = [retention.folder_name(step) for _, step in last.values() if step not in there]
    if gone:
        raise ValueError(
            f"{curves.folder}: of {len(last)} epochs the checkpoints {', '.join(gone)} are not there any more, so test "
            "cannot be scored for each epoch; train with --gin.TrainConfig.keep_last="
            f"{len(curves.steps)}, or leave --with_test_each_epoch out"
        )
    return [(epoch, there[step]) for epoch, step in last.values()]


def scoring_command(curves: RunCurves, checkpoint: Location, out_dir: pathlib.Path) -> tuple[Command, pathlib.Path]:
    """Makes (the command that scores a checkpoint on test, the file that it writes)."""
    name = str(curves.folder.resolve()).strip("/").replace("/", "_")
    result = out_dir / "test_each_epoch" / name / f"{checkpoint.name}.json"
    scored = ("--checkpoint", str(checkpoint), "--split", "test", "--metrics_out", str(result))
    return ("-m", "gpsd_dist.evaluate", *scored), result


def check_comparable(runs: collections.abc.Sequence[RunCurves]) -> None:
    """ValueError unless all runs have the same data set and tasks."""
    for attribute, values in (
        ("data_dir", {str(pathlib.Path(curves.options["data_dir"]).resolve()) for curves in runs}),
        ("tasks", {tuple(curves.valid_auc) for curves in runs}),
    ):
        if len(values) > 1:
            raise ValueError(f"--epochs_figure: runs differ in {attribute}: {sorted(values)}; one figure for each")


def epochs_figure(runs: collections.abc.Sequence[RunCurves]) -> Figure:
    """Draws AUC and gap over epochs, a row of panels per task; thin lines are seeds, thick ones their mean."""
    tasks = list(runs[0].valid_auc)
    figure = panels(len(tasks), 2, f"Metrics over epochs, {runs[0].options['data_dir']}")
    groups = collections.defaultdict(list)
    for curves in sorted(runs, key=lambda c: (STRATEGIES.index(c.strategy), c.label)):
        groups[curves.label].append(curves)
    seen: collections.Counter[str] = collections.Counter()
    for label, members in groups.items():
        strategy = members[0].strategy
        look = {"color": _COLORS[strategy], "linestyle": _STYLES[seen[strategy] % len(_STYLES)]}
        seen[strategy] += 1
        for row, task in enumerate(tasks):
            left, right = figure.axes[2 * row : 2 * row + 2]
            _draw(left, [curves.valid_auc[task] for curves in members], label, look)
            _draw(right, [curves.gap[task] for curves in members if curves.gap[task]], label, look)
            tested = [curves.test_auc[task] for curves in members if task in curves.test_auc]
            _draw(left, tested, f"{label}, test", {**look, "marker": "x", "markersize": 4, "linestyle": "none"})
    for row, task in enumerate(tasks):
        left, right = figure.axes[2 * row : 2 * row + 2]
        left.set(ylabel=f"{task}: AUC on valid")
        right.set(ylabel=f"{task}: log loss, valid - train")
        right.axhline(0, color="black", linewidth=0.6)
    for axes in figure.axes:
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axvline(1, color="black", linewidth=0.6, linestyle=":")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
    return figure


def _draw(axes: Axes, curves: list[Curve], label: str, look: dict[str, typing.Any]) -> None:
    if not curves:
        return
    is_mean = len(curves) > 1
    for curve in curves if is_mean else ():
        axes.plot(*zip(*curve, strict=True), **{**look, "linewidth": 0.7, "alpha": 0.4})
    mean = mean_curve(curves)
    axes.plot(*zip(*mean, strict=True), label=label + (f" ({len(curves)} seeds)" if is_mean else ""), **look)


def mean_curve(curves: list[Curve]) -> Curve:
    """Averages the epochs that all curves have: after early stopping of one, the mean of the rest would jump."""
    values = [dict(curve) for curve in curves]
    common = [epoch for epoch, _ in curves[0] if all(epoch in value for value in values)]
    return [(epoch, float(np.mean([value[epoch] for value in values]))) for epoch in common]


def as_json(runs: collections.abc.Sequence[RunCurves]) -> list[dict[str, typing.Any]]:
    """Lists the numbers behind the figure."""
    return [
        {
            "run": str(curves.folder),
            "label": curves.label,
            "strategy": curves.strategy,
            "seed": curves.options["seed"],
            "valid_auc": curves.valid_auc,
            "log_loss_gap": curves.gap,
            "test_auc": curves.test_auc,
        }
        for curves in runs
    ]
