"""Runs all steps of a fit in order: floors, pretrainings, trainings, choice, refit, scores on test."""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import typing

import torch

from gpsd_dist.baselines.registry import REFIT
from gpsd_dist.checkpoint import storage
from gpsd_dist.commands import environment, shell
from gpsd_dist.data import data_versions
from gpsd_dist.distributed.fork_server import start_server
from gpsd_dist.fit import outcome
from gpsd_dist.fit.data_check import Facts, fingerprint, look
from gpsd_dist.fit.display import Display
from gpsd_dist.fit.plan import Contestant, Plan, make_plan
from gpsd_dist.fit.steps import FLOOR_NAMES, REFITTED_FLOOR, Budget, Runner, best_valid, plan_budget, scores_path
from gpsd_dist.fit.verdict import Entry
from gpsd_dist.metrics.scores import read_scores
from gpsd_dist.scaling.runs import parameters_of

STATE_NAME = "fit.json"
_IDENTITY = ("gin_file", "overrides", "pretrain_gin_file", "pretrain_overrides", "seed")


def run(args: argparse.Namespace) -> outcome.Outcome:
    """Does everything that is not done yet, prints and writes the outcome. Raises what `main` explains."""
    given = args.data
    settle(args)
    facts = look(args.data)
    plan = make_plan(args, facts.can_pretrain)
    state = begin(args, facts)
    budget, num_refits = Budget(args.budget_minutes), int(not args.no_refit)
    plan_budget(budget, len(plan.pretrainings), len(plan.contestants), num_refits)
    num_steps = budget.short_steps_left + len(plan.pretrainings) + len(plan.contestants) + num_refits
    server = start_server(environment()) or contextlib.nullcontext()
    with server as forks, Display(num_steps, args.out / "logs") as display:
        for line in (*facts.lines(), *(f"note: {note}" for note in plan.notes)):
            display.say(line)
        runner = Runner(args.data, args.out, facts, display, budget, forks)
        try:
            with contextlib.closing(runner):
                entries, chosen = _run_steps(args, facts, plan, state, runner)
        except subprocess.CalledProcessError as error:
            raise subprocess.CalledProcessError(error.returncode, error.cmd, display.last_words()) from error
    made = outcome.make(entries, chosen, facts, runner, args)
    outcome.show(made, args.out)
    if chosen is not None:
        source = ("--checkpoint", str(args.out / state["chosen"]), "--data", str(given))
        display.say(f"next: {shell(('-m', 'gpsd_dist.export', *source, '--out', f'artefacts/{args.out.name}'))}")
    return made


def settle(args: argparse.Namespace) -> None:
    """Puts the number of processes and the version of the data into `args`. ValueError under torchrun."""
    if "RANK" in os.environ:
        raise ValueError("fit starts the processes of its trainings itself (--nproc): leave out torchrun")
    if args.nproc is None:
        args.nproc = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    args.data = _version(args)


def _version(args: argparse.Namespace) -> pathlib.Path:
    """Finds the version of the data that all steps read: that of an earlier call, else the current one."""
    path = args.out / STATE_NAME
    if not path.is_file():
        return data_versions.opened(args.data)
    begun = storage.read_json(path)
    first, words = data_versions.name_of(str(begun.get("data_dir"))), f"has the data that {args.out} was begun with"
    wanted = data_versions.Wanted(lambda manifest: fingerprint(manifest) == begun.get("data"), first, words)
    return data_versions.opened(args.data, wanted)


def begin(args: argparse.Namespace, facts: Facts, more: tuple[str, ...] = ()) -> dict[str, typing.Any]:
    """Reads what an earlier call left in RUN. ValueError if it was about other data, or other options.

    `more`: names of options that what is in RUN depends on, besides those of every fit.
    """
    path = args.out / STATE_NAME
    state = storage.read_json(path) if path.is_file() else {}
    options = {
        name: [str(v) for v in value] if isinstance(value := getattr(args, name), list) else value
        for name in (*_IDENTITY, *more)
    }
    if state:
        if state.get("data") != facts.fingerprint:
            raise ValueError(
                f"{args.out} belongs to other data ({state.get('data_dir')}, as they were then): use another --out for "
                f"{args.data}, or delete that folder"
            )
        changed = [f"{name} {state['options'].get(name)!r} there, {v!r} now" for name, v in options.items()
                   if state["options"].get(name) != v]  # fmt: skip
        if changed:
            raise ValueError(f"{args.out} was made with other options ({'; '.join(changed)}): use another --out")
        return state
    state = {"data": facts.fingerprint, "data_dir": str(args.data), "options": options, "chosen": ""}
    storage.write_json(path, state)
    return state


def _run_steps(
    args: argparse.Namespace, facts: Facts, plan: Plan, state: dict[str, typing.Any], runner: Runner
) -> tuple[list[Entry], Entry | None]:
    """Runs all steps in order. Returns the lines of the table, and the one that was chosen."""
    on_valid = {name: runner.floor(name, "valid") for name in FLOOR_NAMES if name != REFITTED_FLOOR}
    without = set()
    for training in plan.pretrainings:
        if not runner.train(f"pretrain {training.folder.parent.name}", training):
            without.add(str(training.folder))
    trained = []
    for one in plan.contestants:
        if one.training.run.init_checkpoint in without:
            runner.display.say(f"{one.label}: left out, its pretraining was not run")
            runner.budget.weights_left.pop(0)
        elif runner.train(one.label, one.training):
            trained.append(one)
    chosen = _choose(trained, facts.tasks[0])
    if chosen is not None:
        _note_choice(args, state, chosen, runner)
    refitted = False
    if chosen is not None and not args.no_refit:
        refitted = runner.train(f"{chosen.label} again on train+valid", chosen.refit)
    entries = []
    for name, valid in on_valid.items():
        on_valid_auc = {task: metrics.get("auc") for task, metrics in valid.items()}
        test, folder = runner.floor(name, "test"), args.out / "floors" / name
        entries.append(_entry(FLOOR_NAMES[name], "floor", on_valid_auc, test, folder))
    if refitted:
        test, folder = runner.floor(REFITTED_FLOOR, "test"), args.out / "floors" / REFITTED_FLOOR
        entries.append(_entry(FLOOR_NAMES[REFITTED_FLOOR], "floor_refit", {}, test, folder))
    best = None
    for one in trained:
        entry = _scored(one, runner, facts)
        entries.append(entry)
        best = entry if one is chosen else best
    if refitted and chosen is not None:
        test = runner.score(f"{chosen.label} refit on test", chosen.refit, "test")
        best = _entry(chosen.label + REFIT, "refit", {}, test, chosen.refit.folder)
        weights = parameters_of(chosen.refit.folder)["dense_parameters"]
        best = dataclasses.replace(best, strategy=chosen.strategy, model=chosen.model, weights=weights)
        entries.append(best)
    return entries, best


def _scored(one: Contestant, runner: Runner, facts: Facts) -> Entry:
    test, metrics = runner.score(f"{one.label} on test", one.training, "test"), best_valid(one.training)
    valid = {task: metrics.get(f"{task}/auc") for task in facts.tasks}
    entry = _entry(one.label, "model", valid, test, one.training.folder)
    weights = parameters_of(one.training.folder)["dense_parameters"]
    return dataclasses.replace(entry, strategy=one.strategy, model=one.model, weights=weights)


def _entry(label: str, kind: str, valid: dict[str, float | None], test: dict, folder: pathlib.Path) -> Entry:
    return Entry(label, kind, valid, test, read_scores(scores_path(folder, "test")) if test else {})


def _choose(trained: list[Contestant], task: str) -> Contestant | None:
    """Chooses by the AUC of `task` on `valid`; the first of equals."""
    known = [(best_valid(one.training).get(f"{task}/auc"), one) for one in trained]
    finite = [(auc, one) for auc, one in known if auc is not None]
    return max(finite, key=lambda pair: pair[0])[1] if finite else None


def _note_choice(args: argparse.Namespace, state: dict[str, typing.Any], chosen: Contestant, runner: Runner) -> None:
    """Writes the choice down before anything is scored on test."""
    folder, before = str(chosen.training.folder.relative_to(args.out)), state["chosen"]
    if before not in ("", folder):
        runner.display.say(f"note: {before} was chosen before, and test has been seen since; now it is {folder}")
    runner.display.say(f"chosen on valid: {chosen.label}")
    state["chosen"] = folder
    storage.write_json(args.out / STATE_NAME, state)
