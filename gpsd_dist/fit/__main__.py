"""ENTRY: fits your own log: baselines, pretraining, models, choice, test, verdict.

    python -m gpsd_dist.fit --data DATA --out RUN

DATA was built from your log by data_pipeline.build. What is done, each step by an ordinary command:

1. without a model: popularity, smoothed rates, boosted trees on `valid`
2. generative pretraining of each model on the histories
3. each model from scratch (NT) and from the pretraining with frozen tables (ST_SF, FT_SF)
4. the best on `valid` (AUC of the first task) is chosen, and trained again on train + valid
5. all are scored on `test`, which decides nothing: a table with 95 % intervals, and one sentence

Options of training are those of the stage and model files; `--gin.X=Y` changes one of the training on labels,
`--pretrain_gin.X=Y` one of the pretraining. Killed? The same command goes on; finished steps are kept. RUN holds
report.html, summary.json, commands.sh (every step as one would type it), a log file per step, and the run folders.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import typing

import torch

from gpsd_dist.checkpoint import storage
from gpsd_dist.commands import add_overrides, exit_status
from gpsd_dist.data import data_versions
from gpsd_dist.fit import outcome
from gpsd_dist.fit.data_check import Facts, fingerprint, look
from gpsd_dist.fit.display import Display
from gpsd_dist.fit.plan import DEFAULT_MODEL, Contestant, Plan, make_plan
from gpsd_dist.fit.steps import FLOOR_NAMES, REFITTED_FLOOR, Budget, Runner, best_valid, plan_budget, scores_path
from gpsd_dist.fit.verdict import REFIT, Entry
from gpsd_dist.metrics.scores import read_scores
from gpsd_dist.scaling.runs import parameters_of

STATE_NAME = "fit.json"
_IDENTITY = ("gin_file", "overrides", "pretrain_gin_file", "pretrain_overrides", "seed")


def main(argv: list[str]) -> int:
    """Returns 0; 2 for a mistake in options or data; 130 if stopped; else the status of the command that failed."""
    args = parse(argv)
    return exit_status(lambda: run(args))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m gpsd_dist.fit", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder that data_pipeline.build wrote")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for everything that is written")
    models_help = f"files of configs/model, like l4h64a4,hstu,din (default {DEFAULT_MODEL}, a Transformer)"
    parser.add_argument("--models", help=models_help)
    parser.add_argument("--strategies", default="NT,ST_SF,FT_SF", help="of each model (default NT,ST_SF,FT_SF)")
    parser.add_argument(
        "--budget_minutes", type=float, help="share so much time among the trainings (default: no limit)"
    )
    parser.add_argument("--nproc", type=int, help="processes of a training (default: one per GPU, or 2 on CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of all trainings (default 0)")
    parser.add_argument("--no_refit", action="store_true", help="do not train the chosen one again on train + valid")
    files = "instead of configs/stage/{}.gin; repeatable, the first may include"
    parser.add_argument("--gin_file", action="append", default=[], help=files.format("finetune"))
    parser.add_argument("--pretrain_gin_file", action="append", default=[], help=files.format("pretrain"))
    args, rest = parser.parse_known_args(argv)
    add_overrides(parser, args, rest)
    if args.nproc is None:
        args.nproc = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    if args.nproc < 1 or (args.budget_minutes is not None and args.budget_minutes <= 0):
        parser.error("--nproc must be at least 1, --budget_minutes above 0")
    args.data, args.out = args.data.absolute(), args.out.absolute()
    return args


def run(args: argparse.Namespace) -> outcome.Outcome:
    """Does everything that is not done yet, prints and writes the outcome. Raises what `main` explains."""
    if "RANK" in os.environ:
        raise ValueError("fit starts the processes of its trainings itself (--nproc): leave out torchrun")
    args.data = _version(args)
    facts = look(args.data)
    plan = make_plan(args, facts.can_pretrain)
    state = _state(args, facts)
    budget, num_refits = Budget(args.budget_minutes), int(not args.no_refit)
    plan_budget(budget, len(plan.pretrainings), len(plan.contestants), num_refits)
    num_steps = budget.short_steps_left + len(plan.pretrainings) + len(plan.contestants) + num_refits
    with Display(num_steps, args.out / "logs") as display:
        for line in (*facts.lines(), *(f"note: {note}" for note in plan.notes)):
            display.say(line)
        runner = Runner(args.data, args.out, facts, display, budget)
        try:
            with contextlib.closing(runner):
                entries, chosen = _run_steps(args, facts, plan, state, runner)
        except subprocess.CalledProcessError as error:
            raise subprocess.CalledProcessError(error.returncode, error.cmd, display.last_words()) from error
    made = outcome.make(entries, chosen, facts, runner, args)
    outcome.show(made, args.out)
    return made


def _version(args: argparse.Namespace) -> pathlib.Path:
    """Finds the version of the data that all steps read: that of an earlier call, else the current one."""
    path = args.out / STATE_NAME
    if not path.is_file():
        return data_versions.opened(args.data)
    begun = storage.read_json(path)
    first, words = data_versions.name_of(str(begun.get("data_dir"))), f"has the data that {args.out} was begun with"
    wanted = data_versions.Wanted(lambda manifest: fingerprint(manifest) == begun.get("data"), first, words)
    return data_versions.opened(args.data, wanted)


def _state(args: argparse.Namespace, facts: Facts) -> dict[str, typing.Any]:
    """Reads what an earlier call left in RUN. ValueError if it was about other data, or other options."""
    path = args.out / STATE_NAME
    state = storage.read_json(path) if path.is_file() else {}
    options = {
        name: [str(v) for v in value] if isinstance(value := getattr(args, name), list) else value for name in _IDENTITY
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
