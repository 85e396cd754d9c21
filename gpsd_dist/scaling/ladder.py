"""Turns a ladder of model sizes into the commands that train and score each rung with each seed."""

import dataclasses
import pathlib
import re

from gpsd_dist.checkpoint import manager
from gpsd_dist.checkpoint.state import read_run
from gpsd_dist.config import STRATEGIES, RunConfig
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.schema import read_manifest

_RUNG = re.compile(r"l(\d+)h(\d+)a(\d+)")
_SET_BY_THE_LADDER = ("LAYERS", "WIDTH", "HEADS", "SEED", "STRATEGY", "INIT_CHECKPOINT", "OUTPUT_DIR", "REFIT_OF")

Command = tuple[str, ...]  # arguments after `python`


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
class Request:
    """Holds the options of the command."""

    ladder: tuple[Rung, ...]
    seeds: tuple[int, ...]
    strategy: str
    out_dir: pathlib.Path
    gin_files: tuple[str, ...]
    overrides: tuple[str, ...] = ()  # `--gin.X=Y` of every finetuning
    pretrain_gin_files: tuple[str, ...] = ()
    pretrain_overrides: tuple[str, ...] = ()  # `--gin.X=Y` of every pretraining
    init_checkpoint: str = ""  # one pretraining for all rungs and seeds, instead of one for each
    split: str = "test"
    num_processes: int = 1
    embedding_dim_follows_width: bool = False


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


def plan(request: Request) -> list[Trial]:
    """Plans trials of all rungs and seeds: parses every command line, runs nothing. ValueError says what does not fit.

    Folders: OUT_DIR/<rung>/s<seed>/{pretrain,<strategy>}, so `benchmarks.collect OUT_DIR/<rung>` reads them too.
    """
    _check(request)
    trials = [_trial(request, rung, seed) for rung in request.ladder for seed in request.seeds]
    read_manifest(trials[0].finetuning.run.data_dir).split(request.split)  # fails now, not after hours of training
    if request.init_checkpoint:
        _check_init_checkpoint(request, trials)
    return trials


def _trial(request: Request, rung: Rung, seed: int) -> Trial:
    home = request.out_dir / rung.name / f"s{seed}"
    pretraining = None
    start = request.init_checkpoint
    if request.pretrain_gin_files:
        start = str(home / "pretrain")
        options = (*request.pretrain_overrides, *_rung_options(request, rung, seed), f"--gin.OUTPUT_DIR={start}")
        pretraining = _training(request, "pretrain", request.pretrain_gin_files, options)
    folder = home / request.strategy.lower()
    options = (*request.overrides, *_rung_options(request, rung, seed), f"--gin.STRATEGY={request.strategy}")
    options += (f"--gin.INIT_CHECKPOINT={start}",) if start else ()
    finetuning = _training(request, "finetune", request.gin_files, (*options, f"--gin.OUTPUT_DIR={folder}"))
    _check_same_data(pretraining, finetuning)
    result = folder / f"{request.split}.json"
    scored = ("--checkpoint", str(folder), "--data", finetuning.run.data_dir, "--split", request.split)
    scoring = _python(request, "gpsd_dist.evaluate", *scored, "--metrics_out", str(result))
    return Trial(rung, seed, pretraining, finetuning, scoring, result)


def _rung_options(request: Request, rung: Rung, seed: int) -> tuple[str, ...]:
    options: tuple[str, ...] = (f"LAYERS={rung.layers}", f"WIDTH={rung.width}", f"HEADS={rung.heads}", f"SEED={seed}")
    if request.embedding_dim_follows_width:
        options += (f"EMBEDDING_DIM={rung.width}",)
    return tuple(f"--gin.{option}" for option in options)


def _training(request: Request, stage: str, gin_files: tuple[str, ...], options: tuple[str, ...]) -> Training:
    arguments = (*(part for file in gin_files for part in ("--gin_file", file)), *options)
    option = "--gin_file" if stage == "finetune" else "--pretrain_gin_file"
    try:
        run = load_run_config(list(arguments)).run
    except ValueError as error:
        raise ValueError(f"{option} {', '.join(gin_files)} with {' '.join(options)}: {error}") from error
    if run.stage != stage:
        raise ValueError(f"{option} {', '.join(gin_files)} describes stage {run.stage!r}, expected {stage!r}")
    return Training(run, _python(request, "gpsd_dist.train", *arguments))


def _python(request: Request, module: str, *arguments: str) -> Command:
    launcher: Command = ("-m",)
    if request.num_processes > 1:
        processes = ("--nproc_per_node", str(request.num_processes), "--standalone")
        launcher = ("-m", "torch.distributed.run", *processes, "-m")
    return (*launcher, module, *arguments)


def _check(request: Request) -> None:
    """ValueError lists everything about the request that can be wrong before a config is read."""
    problems = []
    strategy, is_full = request.strategy, request.strategy in ("FT", "FT_SF")
    if strategy not in STRATEGIES:
        problems.append(f"--strategy {strategy!r} is not one of {STRATEGIES}")
    elif strategy == "NT" and (request.pretrain_gin_files or request.init_checkpoint):
        problems.append("--strategy NT starts from random weights: leave out --pretrain_gin_file and --init_checkpoint")
    elif strategy != "NT" and bool(request.pretrain_gin_files) == bool(request.init_checkpoint):
        given = "both" if request.init_checkpoint else "none"
        problems.append(
            f"--strategy {strategy} needs --pretrain_gin_file or --init_checkpoint, one of them; {given} given"
        )
    elif is_full and request.init_checkpoint:
        problems.append(
            f"--strategy {strategy} takes over the tower, whose size differs from rung to rung: "
            "--init_checkpoint is for ST and ST_SF; use --pretrain_gin_file"
        )
    if request.pretrain_overrides and not request.pretrain_gin_files:
        problems.append(f"{', '.join(request.pretrain_overrides)}: no pretraining is run; leave it out")
    if request.num_processes < 1:
        problems.append(f"--nproc_per_node {request.num_processes} must be at least 1")
    ours = _SET_BY_THE_LADDER + (("EMBEDDING_DIM",) if request.embedding_dim_follows_width else ())
    for override in (*request.overrides, *request.pretrain_overrides):
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


def _check_init_checkpoint(request: Request, trials: list[Trial]) -> None:
    """Checks that all rungs can take over its tables, before the first of them is trained."""
    checkpoint = manager.find(request.init_checkpoint)
    theirs = read_run(checkpoint).run_config
    if theirs["stage"] != "pretrain":
        raise ValueError(f"--init_checkpoint {request.init_checkpoint} is a {theirs['stage']} run, not a pretraining")
    width = theirs["tables"]["embedding_dim"]
    for trial in trials:
        mine = trial.finetuning.run.tables.embedding_dim
        if mine != width:
            raise ValueError(
                f"--init_checkpoint {request.init_checkpoint} has tables of width {width}, {trial.rung.name} has "
                f"{mine}; set --gin.EMBEDDING_DIM={width} (without --embedding_dim_follows_width), or pretrain every "
                "rung with --pretrain_gin_file"
            )
