"""Runs the steps of a fit: a finished one is kept, an interrupted training goes on, a budget ends trainings early."""

import contextlib
import logging
import math
import os
import pathlib
import time
import typing

import torch

from gpsd_dist.baselines.registry import WORDS, evaluate_baseline
from gpsd_dist.checkpoint import manager
from gpsd_dist.checkpoint.state import RunState, read_run
from gpsd_dist.cli.missing import how_to_install
from gpsd_dist.commands import Command, OutOfTime, execute, python_command
from gpsd_dist.distributed.fork_server import ForkServer
from gpsd_dist.distributed.runtime import Runtime, process_group
from gpsd_dist.fit.data_check import Facts
from gpsd_dist.fit.display import Display
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.metrics.scores import read_scores
from gpsd_dist.scaling.ladder import Training
from gpsd_dist.scaling.runs import is_trained, read_result
from gpsd_dist.stages.stage import Metrics
from gpsd_dist.trained_run import evaluate_checkpoint, with_breakdown, write_results

MIN_TRAINING_S = 20.0  # no training gets less, and none less than MIN_STARTS times what starting one took (untuned)
MIN_STARTS = 4
SCORING_S = 15.0  # what scoring a split, or a floor, is reckoned with before its time is known (untuned)
REFITTED_FLOOR = "gbdt_refit"
FLOOR_NAMES = {name: WORDS[name] for name in ("popularity", "rates", "gbdt", REFITTED_FLOOR)}
_TIMEOUT_S = 600
_WEIGHTS = {"pretrain": 2.0, "finetune": 1.0}


class Budget:
    """Shares what is left of a time budget among the trainings that are left."""

    def __init__(self, minutes: float | None):
        self._start_s = time.monotonic()
        self._end_s = math.inf if minutes is None else self._start_s + 60 * minutes
        self.weights_left: list[float] = []
        self.short_steps_left = 0
        self.least_minutes = 0
        """Budget that would have let the first training start that was left out; 0: none was."""
        self._took_s: list[float] = []

    def deadline_s(self, start_up_s: float = 0.0) -> float | None:
        """Returns the moment at which the next training has to stop; None if it should not even start.

        Where the shares would be too small to train anything, the first ones get enough, and nothing is left for the
        last. `start_up_s`: what starting a training has taken.
        """
        share = self.weights_left.pop(0)
        if math.isinf(self._end_s):
            return math.inf
        now_s = time.monotonic()
        short_s = sum(self._took_s) / len(self._took_s) if self._took_s else SCORING_S
        left_s = self._end_s - now_s - short_s * self.short_steps_left
        least_s = max(MIN_TRAINING_S, MIN_STARTS * start_up_s)
        mine_s = max(left_s * share / (share + sum(self.weights_left)), least_s)
        if left_s < least_s:
            short_minutes = (self._end_s - self._start_s + least_s - left_s) / 60
            self.least_minutes = self.least_minutes or math.ceil(short_minutes)
            return None
        return now_s + mine_s

    def end_short_step(self, started_s: float, *, is_kept: bool) -> None:
        """Counts a step that is no training, and notes how long it took since `started_s`."""
        self.short_steps_left -= 1
        if not is_kept:
            self._took_s.append(time.monotonic() - started_s)


class Runner:
    """Runs steps by the ordinary commands, or by the functions that those call."""

    def __init__(
        self,
        data_dir: pathlib.Path,
        out_dir: pathlib.Path,
        facts: Facts,
        display: Display,
        budget: Budget,
        server: ForkServer | None = None,
    ):
        self.data_dir, self.out_dir, self.facts = data_dir, out_dir, facts
        self.display, self.budget = display, budget
        self._server = server  # forks trainings, where it can
        self.commands: list[tuple[str, Command]] = []
        """Title and command of every step so far, as one would type it."""
        self.cut: list[str] = []
        """Folders of trainings that the budget ended."""
        self.rising: list[tuple[str, RunState]] = []
        """Strategy and last state of trainings whose last validation was the best."""
        self.left_out: list[str] = []
        """Titles of trainings that the budget left out."""
        self._scoring = contextlib.ExitStack()
        self._runtime: Runtime | None = None

    def train(self, title: str, training: Training, *, is_whole: bool = False) -> bool:
        """Trains to the end, or as long as the budget allows. Returns whether there is a result.

        `is_whole`: a training that the budget ends is no result; the same command goes on with it.
        """
        with self.display.step(title) as step:
            deadline_s = self.budget.deadline_s(self.display.start_up_s)
            step.is_kept = is_trained(training)
            if not step.is_kept and deadline_s is None:
                step.remark = "left out, the budget is spent"
                self.left_out.append(title)
                return False
            if not step.is_kept:
                try:
                    self._execute(training.command, deadline_s or math.inf)
                except OutOfTime:
                    if is_whole or not checkpoints_of(training):
                        step.remark = f"left out, the budget ended {'in it' if is_whole else 'before its first step'}"
                        self.left_out.append(title)
                        return False
                    self._finish_early(training)
            self.commands.append((title, _with_its_end(training)))
            step.remark = self._remark(training)
            return True

    def _execute(self, command: Command, deadline_s: float = math.inf) -> None:
        execute(command, on_line=self.display.on_line, deadline_s=deadline_s, server=self._server)

    def _finish_early(self, training: Training) -> None:
        """Lets a training that was stopped do one more step, at whose end it validates and counts as finished."""
        step = read_run(manager.find(training.folder, "last")).step
        self._execute((*training.command, f"--gin.TrainConfig.max_steps={step + 1}"))

    def _remark(self, training: Training) -> str:
        """Says how far a training went, and its best validation."""
        last = read_run(manager.find(training.folder, "last"))
        words = [f"{last.step:,} steps"]
        if _cut_at(training):
            words = [f"stopped by the budget at step {last.step:,}"]
            self.cut.append(str(training.folder))
        metrics, names = best_valid(training), ("next_item/mrr", f"{self.facts.tasks[0]}/auc")
        for name in (name for name in names if metrics.get(name) is not None):
            words.append(f"best valid {name} {metrics[name]:.4f} at step {last.progress['best_step']:,}")
            if last.progress["best_step"] == last.step and not _cut_at(training):
                words.append("still rising")
                self.rising.append((training.run.strategy if name != "next_item/mrr" else "pretraining", last))
        return ", ".join(words)

    def score(self, title: str, training: Training, split: str) -> Metrics:
        """Scores a split with a finished training, and keeps the scores."""
        metrics_out, scores_out = training.folder / f"{split}.json", scores_path(training.folder, split)
        options = ("--checkpoint", str(training.folder), "--data", str(self.data_dir), "--split", split)
        files = ("--metrics_out", str(metrics_out), "--scores_out", str(scores_out))
        command = python_command(1, "gpsd_dist.evaluate", *options, *files)
        self.commands.append((title, command))
        started_s = time.monotonic()
        with self.display.step(title) as step:
            known = _known(metrics_out, scores_out)
            step.is_kept = known is not None
            if known is None:
                keep: dict[str, Predictions] = {}
                runtime = self._process_of_one()
                made = evaluate_checkpoint(training.folder, str(self.data_dir), split, runtime, keep=keep)
                write_results(with_breakdown(made, keep), metrics_out, keep, scores_out)
                known = read_result(metrics_out)  # with None for NaN, as the file has it
            step.remark = _aucs(known or {}, self.facts.tasks)
        self.budget.end_short_step(started_s, is_kept=step.is_kept)
        return known or {}

    def floor(self, name: str, split: str, title: str = "") -> Metrics:
        """Scores a split without a model; a task for which that cannot be done is left out, and said."""
        title, folder = title or f"{FLOOR_NAMES[name]} on {split}", self.out_dir / "floors" / name
        metrics_out, scores_out = folder / f"{split}.json", scores_path(folder, split)
        options = ("--baseline", name, "--data", str(self.data_dir), "--split", split)
        files = ("--metrics_out", str(metrics_out), "--scores_out", str(scores_out))
        self.commands.append((title, python_command(1, "gpsd_dist.evaluate", *options, *files)))
        started_s = time.monotonic()
        with self.display.step(title) as step:
            known = _known(metrics_out, scores_out)
            step.is_kept = known is not None
            if known is None:
                keep: dict[str, Predictions] = {}
                made = [self._floor_of_task(name, split, task, keep) for task in self.facts.tasks]
                if keep:
                    metrics = {task: values for part in made for task, values in part.items()}
                    write_results(with_breakdown(metrics, keep), metrics_out, keep, scores_out)
                    known = read_result(metrics_out)
            step.remark = _aucs(known or {}, self.facts.tasks)
        self.budget.end_short_step(started_s, is_kept=step.is_kept)
        return known or {}

    def _process_of_one(self) -> Runtime:
        """Makes this process a group of one that scores models: starting another one takes longer than most scoring."""
        if self._runtime is None:
            self._scoring.enter_context(_as_before())
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as a child has, for the same bits
            self._runtime = self._scoring.enter_context(process_group(_TIMEOUT_S))
            logging.getLogger("gpsd_dist").setLevel(logging.WARNING)  # the display says what is scored
        return self._runtime

    def close(self) -> None:
        """Leaves the group of one, if there is one; threads and log of this process are then as they were."""
        self._scoring.close()

    def _floor_of_task(self, name: str, split: str, task: str, keep: dict[str, Predictions]) -> Metrics:
        try:
            return evaluate_baseline(name, self.data_dir, split, [task], keep=keep)
        except ImportError as error:
            self.display.say(f"    left out: {error}; {how_to_install(error.name or '')}".rstrip("; "))
        except ValueError as error:
            self.display.say(f"    left out for {task}: {error}")
        return {}


@contextlib.contextmanager
def _as_before() -> typing.Iterator[None]:
    """Puts back, at its end, what scoring changes in a process that may be a notebook: torch's threads and our log."""
    logger, threads = logging.getLogger("gpsd_dist"), torch.get_num_threads()
    before = logger.level, logger.propagate, logger.handlers
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1:]


def _known(metrics_out: pathlib.Path, scores_out: pathlib.Path) -> Metrics | None:
    """Reads the metrics of an earlier call; None if they, or the scores beside them, are missing or cannot be read."""
    try:
        read_scores(scores_out)
    except ValueError:
        return None
    return read_result(metrics_out)


def scores_path(folder: pathlib.Path, split: str) -> pathlib.Path:
    """Gives the file that holds the scores of a split beside the metrics in `folder`."""
    return folder / f"{split}_scores.parquet"


def plan_budget(budget: Budget, pretrainings: int, contestants: int, num_refits: int) -> None:
    """Tells the budget what lies ahead."""
    budget.weights_left = [_WEIGHTS["pretrain"]] * pretrainings + [_WEIGHTS["finetune"]] * (contestants + num_refits)
    floors = 2 * (len(FLOOR_NAMES) - 1) + num_refits
    budget.short_steps_left = floors + contestants + num_refits


def checkpoints_of(training: Training) -> list[pathlib.Path]:
    """Lists what a training has saved."""
    return list((training.folder / "checkpoints").glob("step_*"))


def best_valid(training: Training) -> dict[str, typing.Any]:
    """Reads "task/metric" -> value of a training's best validation, without what is not a number."""
    metrics = read_run(manager.find(training.folder)).metrics
    return {name: value for name, value in metrics.items() if value is not None and value == value}  # NaN is no value


def _cut_at(training: Training) -> int:
    """Returns the step at which the budget ended a training; 0 if it did not."""
    max_steps = read_run(manager.find(training.folder, "last")).run_config["train"]["max_steps"]
    return max_steps if max_steps != training.run.train.max_steps else 0


def _with_its_end(training: Training) -> Command:
    """Gives the command of a finished training: with its last step, if the budget ended it."""
    cut_at = _cut_at(training)
    return (*training.command, f"--gin.TrainConfig.max_steps={cut_at}") if cut_at else training.command


def _aucs(metrics: Metrics, tasks: tuple[str, ...]) -> str:
    known = {task: metrics[task].get("auc") for task in tasks if task in metrics}
    return ", ".join(f"{task} AUC {'-' if auc is None else f'{auc:.4f}'}" for task, auc in known.items())
