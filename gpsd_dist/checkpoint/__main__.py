"""ENTRY: lists, verifies, compares and prunes the checkpoints of finished or running runs, on disk or behind a URL.

    python -m gpsd_dist.checkpoint list runs/kr/st_sf
    python -m gpsd_dist.checkpoint verify runs/kr/st_sf              # or one checkpoint; exit status 1: damaged
    python -m gpsd_dist.checkpoint diff runs/kr/st_sf runs/kr/ft_sf  # best of each; exit status 1: they differ
    python -m gpsd_dist.checkpoint prune s3://bucket/run --keep_last 1 --dry_run

A run is its folder, or what its TrainConfig.checkpoint_dir names.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.checkpoint ...")

import argparse
import contextlib
import datetime
import json

import rich.box
import rich.table

from gpsd_dist.checkpoint import integrity, manager, resume, retention, state, storage
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.console import Console
from gpsd_dist.disk.text import say_error

_SHOWN = ("auc", "gauc", "log_loss", "mrr")
"""`list` shows the metrics whose names end in these; run_state.json has all of them."""


def list_checkpoints(run: str, console: Console) -> int:
    """Prints one line per checkpoint folder, complete or not. Compares file sizes, reads no tensors. Returns 0."""
    folder = manager.checkpoint_folder(storage.location(run))
    best = retention.best(folder)
    table = rich.table.Table(box=rich.box.SIMPLE, title=str(folder))
    for column in ("checkpoint", "epoch", "saved", "MB", "metrics of valid", "best", "files"):
        table.add_column(column, justify="right" if column in ("epoch", "MB") else "left")
    found = retention.step_folders(folder)
    for path in found:
        mark = "best" if path == best else ""
        table.add_row(path.name, *_facts(path), mark, _condition(path))
    if not found:
        raise ValueError(f"{folder} holds no checkpoint; is {run} a run folder, and has it saved one?")
    console.print(table)
    return 0


def _facts(path: Location) -> list[str]:
    """Returns epoch, time, size and metrics as text; empty where they cannot be known."""
    try:
        sums = integrity.read_checksums(path)
        run = state.read_run(path)
    except (ValueError, FileNotFoundError):
        return ["", "", "", ""]
    time, size = "", ""
    if sums is not None:
        time = datetime.datetime.fromtimestamp(sums.time_s).isoformat(" ", "seconds")
        size = f"{sum(entry.num_bytes for entry in sums.files.values()) / 1e6:,.1f}"
    shown = {name: value for name, value in run.metrics.items() if name.rsplit("/", 1)[-1] in _SHOWN}
    metrics = "\n".join(f"{name} {value:.5f}" for name, value in shown.items())
    return [f"{resume.epochs_done(run):.2f}", time, size, metrics]


def _condition(path: Location) -> str:
    """Says in words whether all files of a checkpoint are there, in the sizes that were written."""
    if (path / retention.DAMAGED_NAME).is_file():
        return "damaged, set aside"
    if not (path / retention.STATE_NAME).is_file():
        return "unfinished"
    try:
        sums = integrity.read_checksums(path)
        problems = integrity.wrong_sizes(path, sums) if sums is not None else []
    except ValueError as error:
        return str(error)
    if problems:
        return "damaged: " + "; ".join(problems)
    return "all there" if sums is not None else "no checksums (older version)"


def verify(path: str, console: Console) -> int:
    """Compares every file of a checkpoint, or of all of a run, with its checksum. Returns 1 for damage, else 0."""
    place = storage.location(path)
    checkpoints = [place] if (place / retention.STATE_NAME).is_file() else []
    checkpoints = checkpoints or retention.complete(manager.checkpoint_folder(place))
    if not checkpoints:
        manager.find(place)  # raises, with what was looked for
    num_damaged = 0
    for checkpoint in checkpoints:
        try:
            sums = integrity.read_checksums(checkpoint)
            if sums is None:
                console.print(f"{checkpoint}: not verified, saved without checksums by an older version")
                continue
            if problems := integrity.wrong_files(checkpoint, sums, sums.files):
                raise integrity.DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {'; '.join(problems)}")
            console.print(f"{checkpoint}: ok, {len(sums.files)} files")
        except (integrity.DamagedCheckpoint, FileNotFoundError) as error:
            if not (checkpoint / retention.STATE_NAME).is_file():  # it was listed, so it is gone since then
                console.print(f"{checkpoint}: not verified, its run has deleted it meanwhile or set it aside")
                continue
            num_damaged += 1
            console.print(str(error), style="bold red")
    return 1 if num_damaged else 0


def prune(run: str, keep_last: int, keep_every_hours: float, is_dry: bool, console: Console) -> int:
    """Deletes the checkpoints that `retention.removable` names, or prints them if `is_dry`. Returns 0."""
    if keep_last < 1 or keep_every_hours < 0:
        raise ValueError(f"--keep_last {keep_last} must be >= 1, --keep_every_hours {keep_every_hours} >= 0")
    folder = manager.checkpoint_folder(storage.location(run))
    if not retention.complete(folder):
        manager.find(run)  # raises, with what was looked for
    gone = retention.removable(folder, keep_last, keep_every_hours)
    for path in gone:
        if not is_dry:
            with contextlib.suppress(FileNotFoundError):  # a run that goes on has pruned it first
                storage.delete(path, retention.STATE_NAME)
        console.print(f"{'would delete' if is_dry else 'deleted'} {path}")
    kept = [path.name for path in retention.complete(folder) if path not in gone]
    console.print(f"{len(gone)} to delete, kept: {', '.join(kept)}" if is_dry else f"kept: {', '.join(kept)}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m gpsd_dist.checkpoint", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="step, epoch, time, size, metrics of each").add_argument("run")
    commands.add_parser("verify", help="compare every file with its checksum").add_argument("path")
    differ = commands.add_parser("diff", help="compare tensors and options")
    differ.add_argument("first")
    differ.add_argument("second")
    pruner = commands.add_parser("prune", help="delete old checkpoints; never the best one")
    pruner.add_argument("run")
    pruner.add_argument("--keep_last", type=int, required=True, help="newest checkpoints that stay")
    pruner.add_argument(
        "--keep_every_hours", type=float, default=0.0, help="also one per this many hours (default: none)"
    )
    pruner.add_argument("--dry_run", action="store_true", help="say what would be deleted")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs a command. Returns exit status 1 for damage (`verify`) or differences (`diff`), 2 for wrong arguments."""
    args = _parse(argv)
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 200  # wide enough that a file holds whole lines
    try:
        if args.command == "list":
            return list_checkpoints(args.run, console)
        if args.command == "verify":
            return verify(args.path, console)
        if args.command == "diff":
            from gpsd_dist.checkpoint.difference import diff  # reads tensors, so it needs torch

            return diff(args.first, args.second, console)
        return prune(args.run, args.keep_last, args.keep_every_hours, args.dry_run, console)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        return say_error(error)


if __name__ == "__main__":
    sys.exit(run_main(main))
