"""ENTRY: writes a synthetic log, builds it, and fits it as you would fit your own. `make quickstart` calls it.

It generates and prepares data, and calls `python -m gpsd_dist.fit` on them: baselines, pretraining, NT, ST&SF and
FT&SF, choice, test, verdict. Then it exports the chosen run, serves it, and compares 100 answers with `evaluate`. A
rerun goes on where the last one stopped: it keeps prepared data and finished runs. Delete the folder to start over.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.quickstart ...")

import argparse
import dataclasses
import functools
import itertools
import pathlib
import time

from gpsd_dist.checkpoint import storage
from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser, as_typed
from gpsd_dist.commands import execute, exit_status, shell
from gpsd_dist.fit.__main__ import main as fit


@dataclasses.dataclass(frozen=True)
class Size:
    """Sets the size of data and training."""

    synthesize: tuple[str, ...]  # options of data_pipeline.synthesize
    fit: tuple[str, ...]  # options of gpsd_dist.fit


FULL = Size((), ())
_PARTS = ("log and data", "fit, to the table", "export, serving and comparison")  # whose times are printed
_TINY = "configs/model/l1h32a4.gin"
SMALL = Size(
    ("--num_users", "1500", "--num_items", "1600", "--requests_per_day", "600"),
    ("--gin_file", _TINY, "--pretrain_gin_file", _TINY, "--pretrain_gin.EPOCHS=2", "--gin.EPOCHS=1"),
)


def main(argv: list[str]) -> int:
    """Returns 0, or the exit status of the first command that failed."""
    parser = Parser(prog="python -m gpsd_dist.quickstart", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out_dir", type=pathlib.Path, default=pathlib.Path("runs/quickstart"))
    parser.add_argument("--small", action="store_true", help="a tenth of the data, a tiny model: does it run at all?")
    parser.add_argument("--nproc", type=int, default=2, help="training processes (default 2)")
    args = parser.parse_args(argv)
    size, ends_s = SMALL if args.small else FULL, [time.monotonic()]
    raw, data = args.out_dir.absolute() / "raw", args.out_dir.absolute() / "data"
    if status := exit_status(lambda: prepare(raw, data, size)):
        return status
    ends_s.append(time.monotonic())
    options = ["--data", str(data), "--out", str(args.out_dir), "--nproc", str(args.nproc)]
    for stage, option in (("finetune", "--gin_file"), ("pretrain", "--pretrain_gin_file")):
        options += [option, f"configs/experiments/quickstart_{stage}.gin"]
    print(f"\n$ {shell(('-m', 'gpsd_dist.fit', *options, *size.fit))}", flush=True)
    if status := fit([*options, *size.fit]):
        return status
    ends_s.append(time.monotonic())
    if status := exit_status(lambda: serve(args.out_dir, data)):
        return status
    ends_s.append(time.monotonic())
    parts = zip(_PARTS, itertools.pairwise(ends_s), strict=True)
    took = (f"{name} {end - begin:.0f} s" for name, (begin, end) in parts)
    print(f"{args.out_dir / 'summary.json'}: {', '.join(took)}; {ends_s[-1] - ends_s[0]:.0f} s in all")
    print(f"curves: {sys.executable} -m tensorboard.main --logdir {args.out_dir}")
    own = "your own log: python -m data_pipeline.build --source generic ..., then python -m gpsd_dist.fit (README.md)"
    print(as_typed(own))
    return 0


def serve(out_dir: pathlib.Path, data: pathlib.Path) -> None:
    """Exports the run that was chosen, verifies it, serves it, and compares 100 answers with `evaluate`."""
    chosen = storage.read_json(out_dir / "fit.json")["chosen"]
    if not chosen:
        return
    artefact, source = str(out_dir / "artefact"), ("--checkpoint", str(out_dir / chosen), "--data", str(data))
    say = functools.partial(print, flush=True)
    execute(("-m", "gpsd_dist.export", *source, "--out", artefact), say=say)
    execute(("-m", "gpsd_dist.export", "verify", artefact), say=say)
    execute(("-m", "gpsd_dist.export", "parity", artefact, *source), say=say)


def prepare(raw: pathlib.Path, data: pathlib.Path, size: Size) -> None:
    """Writes the synthetic log to `raw`, and builds it in `data`. CalledProcessError, Stopped."""
    say = functools.partial(print, flush=True)
    if not (raw / "schema.toml").is_file():
        execute(("-m", "data_pipeline.synthesize", "--out_dir", str(raw), *size.synthesize), say=say)
    build = ("-m", "data_pipeline.build", "--source", "synthetic", "--raw_dir", str(raw), "--out_dir", str(data))
    execute(build, say=say)


if __name__ == "__main__":
    sys.exit(run_main(main))
