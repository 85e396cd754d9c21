"""Trains to each day of a log and scores the days after it: from scratch, and by going on with the model of before.

Everything about day d is decided by rows up to d: the number of epochs, by a training that is validated on the first
model's day; which values are known; trees and rates. Each piece is a step that is kept, so that a call that was stopped
goes on where it was. The budget ends the call between two steps, or stops a training, which then goes on as well.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import time

from gpsd_dist.checkpoint import manager
from gpsd_dist.checkpoint.resume import epochs_done
from gpsd_dist.checkpoint.state import read_run
from gpsd_dist.commands import environment
from gpsd_dist.disk.writing import write
from gpsd_dist.distributed.fork_server import start_server
from gpsd_dist.fit import daily_outcome, outcome
from gpsd_dist.fit.daily_outcome import FLOORS, SCRATCH, WARM, Scores
from gpsd_dist.fit.data_check import Facts, opened
from gpsd_dist.fit.days import Days, check_can_pretrain, check_days_are_whole, find, name_of
from gpsd_dist.fit.display import Display
from gpsd_dist.fit.plan import Plan, make_plan, training_of
from gpsd_dist.fit.procedure import begin, settle
from gpsd_dist.fit.steps import Budget, Runner, scores_path
from gpsd_dist.metrics.scores import read_scores
from gpsd_dist.scaling.ladder import Training

_OPTIONS = ("daily", "models", "strategies", "days", "max_age", "warm_epochs")
_STEPS_OF_A_DAY = 4 + len(FLOORS)


class DailyBudget(Budget):
    """Ends a call when its time is up; a training gets all that is left, because a shorter one is another model."""

    def deadline_s(self, start_up_s: float = 0.0) -> float | None:
        return None if time.monotonic() >= self._end_s else self._end_s


def run(args: argparse.Namespace) -> daily_outcome.Outcome:
    """Does everything that is not done yet, prints and writes the outcome. Raises what `main` explains."""
    settle(args)
    manifest, rows = opened(args.data)
    check_days_are_whole(args.data, manifest)
    facts = Facts(manifest, {}, rows.get("pretrain", 0) > 0)
    days = find(args.data, manifest, args.out / "rows", args.days)
    plan = make_plan(args, facts.can_pretrain)
    if plan.pretrainings:
        check_can_pretrain(args.data, manifest, days)
    begin(args, facts, _OPTIONS)  # nothing after this can refuse options or data
    days.write(args.data)
    num_steps = len(plan.pretrainings) + _STEPS_OF_A_DAY * len(days.models) - 1  # the choice, and no first warm start
    server = start_server(environment()) or contextlib.nullcontext()
    with server as forks, Display(num_steps, args.out / "logs") as display:
        for line in (*days.lines(), *(f"note: {note}" for note in plan.notes)):
            display.say(line)
        runner = Runner(args.data, args.out, facts, display, DailyBudget(args.budget_minutes), forks)
        try:
            with contextlib.closing(runner):
                scores = _Daily(args, days, runner, plan).all()
        except subprocess.CalledProcessError as error:
            raise subprocess.CalledProcessError(error.returncode, error.cmd, display.last_words()) from error
    made = daily_outcome.make(scores, days, facts.tasks, runner.left_out)
    daily_outcome.show(made, args.out)
    write(args.out / "commands.sh", outcome.script(runner.commands).encode())
    return made


class _Daily:
    """Runs the steps of each day, in order, as long as the budget lasts."""

    def __init__(self, args: argparse.Namespace, days: Days, runner: Runner, plan: Plan):
        self._args, self._days, self._runner, self._plan = args, days, runner, plan
        self._strategy = plan.contestants[0].strategy
        self._options: tuple[str, ...] = ()
        """Options of all later trainings. Whether heads read matches is one of them: a warm start cannot change it."""
        self._start: tuple[str, ...] = ()

    def all(self) -> list[Scores]:
        """Runs all days; the scores of those that the budget left time for."""
        scores: list[Scores] = []
        if not self._first():
            return scores
        before: Training | None = None
        for day in self._days.models:
            made = self._one(day, before)
            if made is None:
                break
            before, found = made
            scores += found
        return scores

    def _first(self) -> bool:
        """Pretrains, and chooses the number of epochs on the first model's day. Returns whether there was time."""
        day = self._days.first
        data = self._days.data_set(self._args.out / "first/data", [day - 1], [day], known=day - 1)
        if self._strategy != "NT":
            # A model without a pretraining of its own takes the tables of another one's, as in any fit.
            source = self._plan.pretrainings[0].folder.parent.relative_to(self._args.out).name
            pretraining = self._training("pretrain", data, "first", "pretrain", model=source)
            if not self._runner.train("pretraining", pretraining, is_whole=True):
                return False
            self._start = (f"--gin.INIT_CHECKPOINT={pretraining.folder}",)
        choice = self._training("finetune", data, "first", "choice", f"--gin.STRATEGY={self._strategy}", *self._start)
        if not self._runner.train(f"how many epochs, on {name_of(day)}", choice, is_whole=True):
            return False
        best = read_run(manager.find(choice.folder))
        epochs, model = max(1, round(epochs_done(best))), best.run_config["model"]
        self._runner.display.say(
            f"epochs of a training from scratch: {epochs}, of a warm start: {self._args.warm_epochs}"
        )
        # A choice of before an option was there was made without it.
        given = [f"--gin.ModelConfig.{name}={model.get(name, False)}" for name in ("matches", "bag_matches")]
        self._options = (*given, "--gin.PATIENCE=0")
        self._start = (f"--gin.STRATEGY={self._strategy}", f"--gin.EPOCHS={epochs}", *self._start)
        return True

    def _one(self, day: int, before: Training | None) -> tuple[Training, list[Scores]] | None:
        """Trains and scores one day; the first model has no model before it. None if the budget ended it."""
        args, days, runner, name = self._args, self._days, self._runner, name_of(day)
        home, scored = args.out / "days" / name, list(range(day + 1, min(day + args.max_age, days.scored[-1]) + 1))
        later = [other for other in days.scored if other > day]
        scored = sorted({*scored, later[0]})  # after a gap the next day is older than --max_age may be
        everything = range(days.first - 1, day + 1)
        data = days.data_set(home / "data", everything, (), scored, known=day)
        scratch = self._training("finetune", data, f"days/{name}", "scratch", *self._options, *self._start)
        if not runner.train(f"{name} {SCRATCH}", scratch, is_whole=True):
            return None
        found, last = [self._scored(SCRATCH, day, scratch, data)], scratch
        if before is not None:
            frozen = "_SF" * self._strategy.endswith("_SF")
            start = [f"--gin.STRATEGY=FT{frozen}", f"--gin.INIT_CHECKPOINT={before.folder}"]
            start += ["--gin.FinetuneConfig.warm_start=True", f"--gin.EPOCHS={args.warm_epochs}"]
            new = days.data_set(home / "new_rows", [day], (), scored, known=day)
            last = self._training("finetune", new, f"days/{name}", "warm", *self._options, *start)
            if not runner.train(f"{name} {WARM}", last, is_whole=True):
                return None
            found.append(self._scored(WARM, day, last, new))
        runner.data_dir = days.data_set(home / "floor_data", everything[:-1], [day], scored, known=day)
        runner.out_dir = home
        for floor, label in FLOORS.items():
            if runner.floor(floor, "test", f"{name} {label}"):
                columns = read_scores(scores_path(home / "floors" / floor, "test"))
                found.append(Scores(label, day, columns, None))
        return last, found

    def _scored(self, label: str, day: int, training: Training, data: pathlib.Path) -> Scores:
        self._runner.data_dir = data
        self._runner.score(f"{name_of(day)} {label}, the days after it", training, "test")
        return Scores(label, day, read_scores(scores_path(training.folder, "test")), cpu_s(training.folder))

    def _training(
        self, stage: str, data: pathlib.Path, home: str, name: str, *options: str, model: str | None = None
    ) -> Training:
        args = argparse.Namespace(**vars(self._args) | {"data": data, "out": self._args.out / home})
        return training_of(args, self._plan.contestants[0].model if model is None else model, stage, options, name)


def cpu_s(folder: pathlib.Path) -> float:
    """Sums the CPU seconds of all processes of a training, over the starts that it took."""
    total = last = 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        used = json.loads(line).get("perf/cpu_s")
        if used is not None:
            total, last = total + (last if used < last else 0.0), used
    return total + last
