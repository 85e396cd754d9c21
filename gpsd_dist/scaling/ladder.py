"""Turns a ladder of model sizes into the commands that train and score each rung with each seed."""

import argparse
import dataclasses
import pathlib
import re
import typing

from gpsd_dist.checkpoint import manager
from gpsd_dist.checkpoint.resume import version_of
from gpsd_dist.checkpoint.state import read_run
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.commands import Command, python_command
from gpsd_dist.config import STRATEGIES, RunConfig
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.data.run_manifest import with_data_version
from gpsd_dist.schema import read_manifest

_RUNG = re.compile(r"l(\d+)h(\d+)a(\d+)")
_SET_BY_THE_LADDER = ("LAYERS", "WIDTH", "HEADS", "SEED", "STRATEGY", "INIT_CHECKPOINT", "OUTPUT_DIR", "REFIT_OF")


@dataclasses.dataclass(frozen=True)
class Rung:
    """Gives one size of the tower."""

    layers: int
    width: int
    heads: int

    @property
    def name(self) -> str:
        """Names the size like the paper does: l4h64a4."""
        return f"l{self.layers}h{self.width}a{self.heads}"


def parse_ladder(text: str) -> tuple[Rung, ...]:
    """Parses "l1h32a4,l4h32a4". ValueError lists everything that is not a rung.

    Which widths go with which heads depends on the model, so `plan` checks that.
    """
    rungs: list[Rung] = []
    problems = []
    for part in text.split(","):
        match = _RUNG.fullmatch(part.strip().lower())
        if match is None:
            problems.append(f"{part.strip()!r} is not of the form l4h64a4 (layers, width, heads)")
            continue
        rung = Rung(*map(int, match.groups()))
        if 0 in (rung.layers, rung.width, rung.heads):
            problems.append(f"{part.strip()}: layers, width and heads must be at least 1")
        elif rung in rungs:
            problems.append(f"{part.strip()} stands in it twice")
        rungs.append(rung)
    if problems:
        raise ValueError(f"--ladder {text}: {'; '.join(problems)}")
    return tuple(rungs)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parses "0,1,2". ValueError for anything else, and for a repeated seed."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part) for part in parts):
        raise ValueError(f"--seeds {text}: expected whole numbers separated by commas, like 0,1,2")
    seeds = tuple(map(int, parts))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: each seed once")
    return seeds


@dataclasses.dataclass(frozen=True)
class Training:
    """Holds one run of gpsd_dist.train."""

    run: RunConfig  # the options that the command will parse
    command: Command

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.run.output_dir)


@dataclasses.dataclass(frozen=True)
class Trial:
    """Holds up to three commands of a rung with a seed, and the file that the last one writes."""

    rung: Rung
    seed: int
    pretraining: Training | None
    finetuning: Training
    scoring: Command
    result: pathlib.Path

    @property
    def commands(self) -> list[Command]:
        """Lists the commands in the order in which they run."""
        trainings = [self.finetuning] if self.pretraining is None else [self.pretraining, self.finetuning]
        return [*(training.command for training in trainings), self.scoring]


def plan(args: argparse.Namespace) -> list[Trial]:
    """Plans trials of all rungs and seeds: parses every command line, runs nothing. ValueError says what does not fit.

    Folders: OUT_DIR/<rung>/s<seed>/{pretrain,<strategy>}, so `benchmarks.collect OUT_DIR/<rung>` reads them too.
    """
    _check(args)
    cells = [(rung, seed) for rung in parse_ladder(args.ladder) for seed in parse_seeds(args.seeds)]
    first = _trial(args, *cells[0])
    data_dir = _version(first)
    read_manifest(data_dir).split(args.split)  # fails now, not after hours of training
    one_version = () if data_dir == first.finetuning.run.data_dir else (f"--gin.DATA_DIR={data_dir}",)
    trials = [_trial(args, rung, seed, one_version) for rung, seed in cells]
    if args.init_checkpoint:
        _check_init_checkpoint(args, trials)
    return trials


def _version(trial: Trial) -> str:
    """Finds the version of the data that all trials read: that of an earlier call, else the current one."""
    for training in filter(None, (trial.pretraining, trial.finetuning)):
        if (training.folder / "run_config.json").is_file() and (
            checkpoint := checkpoint_in(training.folder)
        ) is not None:
            return with_data_version(training.run, version_of(read_run(checkpoint), checkpoint)).data_dir
    return with_data_version(trial.finetuning.run).data_dir


def checkpoint_in(folder: pathlib.Path) -> Location | None:
    """Returns the last checkpoint of a run, None where there is none."""
    try:
        return manager.find(folder, "last")
    except ValueError:
        return None


def _trial(args: argparse.Namespace, rung: Rung, seed: int, one_version: tuple[str, ...] = ()) -> Trial:
    home, of_rung = args.out_dir / rung.name / f"s{seed}", (*_rung_options(args, rung, seed), *one_version)
    pretraining = None
    start = args.init_checkpoint
    if args.pretrain_gin_file:
        start = str(home / "pretrain")
        options = (*args.pretrain_overrides, *of_rung, f"--gin.OUTPUT_DIR={start}")
        pretraining = make_training("pretrain", args.pretrain_gin_file, options, args.nproc_per_node)
    folder = home / args.strategy.lower()
    options = (*args.overrides, *of_rung, f"--gin.STRATEGY={args.strategy}")
    options += (f"--gin.INIT_CHECKPOINT={start}",) if start else ()
    options += (f"--gin.OUTPUT_DIR={folder}",)
    finetuning = make_training("finetune", args.gin_file, options, args.nproc_per_node)
    _check_same_data(pretraining, finetuning)
    result = folder / f"{args.split}.json"
    scored = ("--checkpoint", str(folder), "--data", finetuning.run.data_dir, "--split", args.split)
    scoring = python_command(args.nproc_per_node, "gpsd_dist.evaluate", *scored, "--metrics_out", str(result))
    return Trial(rung, seed, pretraining, finetuning, scoring, result)


def _rung_options(args: argparse.Namespace, rung: Rung, seed: int) -> tuple[str, ...]:
    options: tuple[str, ...] = (f"LAYERS={rung.layers}", f"WIDTH={rung.width}", f"HEADS={rung.heads}", f"SEED={seed}")
    if args.embedding_dim_follows_width:
        options += (f"EMBEDDING_DIM={rung.width}",)
    return tuple(f"--gin.{option}" for option in options)


def make_training(stage: str, gin_files: list[str], options: typing.Iterable[str], num_processes: int) -> Training:
    """Makes the command of a run, and parses it. ValueError if it does not fit, or is about another stage."""
    arguments = [*(part for file in gin_files for part in ("--gin_file", file)), *options]
    option = "--gin_file" if stage == "finetune" else "--pretrain_gin_file"
    try:
        run = load_run_config(arguments).run
    except ValueError as error:
        raise ValueError(f"{stage} with {' '.join(arguments)}: {error}") from error
    if run.stage != stage:
        raise ValueError(f"{option} {', '.join(gin_files)} describes stage {run.stage!r}, expected {stage!r}")
    return Training(run, python_command(num_processes, "gpsd_dist.train", *arguments))


def _check(args: argparse.Namespace) -> None:
    """ValueError lists everything in the options that can be wrong before a config is read."""
    problems = []
    strategy, is_full = args.strategy, args.strategy in ("FT", "FT_SF")
    if strategy not in STRATEGIES:
        problems.append(f"--strategy {strategy!r} is not one of {STRATEGIES}")
    elif strategy == "NT" and (args.pretrain_gin_file or args.init_checkpoint):
        problems.append("--strategy NT starts from random weights: leave out --pretrain_gin_file and --init_checkpoint")
    elif strategy != "NT" and bool(args.pretrain_gin_file) == bool(args.init_checkpoint):
        given = "both" if args.init_checkpoint else "none"
        problems.append(
            f"--strategy {strategy} needs --pretrain_gin_file or --init_checkpoint, one of them; {given} given"
        )
    elif is_full and args.init_checkpoint:
        problems.append(
            f"--strategy {strategy} takes over the tower, whose size differs from rung to rung: "
            "--init_checkpoint is for ST and ST_SF; use --pretrain_gin_file"
        )
    if args.pretrain_overrides and not args.pretrain_gin_file:
        problems.append(f"{', '.join(args.pretrain_overrides)}: no pretraining is run; leave it out")
    if args.nproc_per_node < 1:
        problems.append(f"--nproc_per_node {args.nproc_per_node} must be at least 1")
    ours = _SET_BY_THE_LADDER + (("EMBEDDING_DIM",) if args.embedding_dim_follows_width else ())
    for override in (*args.overrides, *args.pretrain_overrides):
        if override.removeprefix("--gin.").split("=")[0] in ours:
            problems.append(f"{override}: {', '.join(ours)} are set by the ladder; leave it out")
    if problems:
        raise ValueError("; ".join(problems))


def _check_same_data(pretraining: Training | None, finetuning: Training) -> None:
    if pretraining is not None and pretraining.run.data_dir != finetuning.run.data_dir:
        raise ValueError(
            f"pretraining would read {pretraining.run.data_dir} and finetuning {finetuning.run.data_dir}: "
            "set --gin.DATA_DIR and --pretrain_gin.DATA_DIR to the same folder"
        )


def _check_init_checkpoint(args: argparse.Namespace, trials: list[Trial]) -> None:
    """Checks that all rungs can take over its tables, before the first of them is trained."""
    checkpoint = manager.find(args.init_checkpoint)
    theirs = read_run(checkpoint).run_config
    if theirs["stage"] != "pretrain":
        raise ValueError(f"--init_checkpoint {args.init_checkpoint} is a {theirs['stage']} run, not a pretraining")
    width = theirs["tables"]["embedding_dim"]
    for trial in trials:
        mine = trial.finetuning.run.tables.embedding_dim
        if mine != width:
            raise ValueError(
                f"--init_checkpoint {args.init_checkpoint} has tables of width {width}, {trial.rung.name} has "
                f"{mine}; set --gin.EMBEDDING_DIM={width} (without --embedding_dim_follows_width), or pretrain every "
                "rung with --pretrain_gin_file"
            )
