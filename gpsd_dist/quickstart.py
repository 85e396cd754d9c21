"""ENTRY: runs the whole path on synthetic data by the commands that a user would type. `make quickstart` calls it.

It generates and prepares data, pretrains, trains NT, ST&SF and FT&SF with torchrun, scores the test split and prints
one table. A rerun goes on where the last one stopped: it keeps prepared data and finished runs. Delete the folder to
start over.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import rich.console
import rich.table

from gpsd_dist.commands import Stopped, execute, python_command, shell

STRATEGIES = ("NT", "ST_SF", "FT_SF")
METRICS = ("auc", "gauc", "log_loss", "ne", "calibration", "rows")


@dataclasses.dataclass(frozen=True)
class Size:
    """Sets the size of data and training."""

    synthesize: tuple[str, ...]  # options of data_pipeline.synthesize
    pretrain: tuple[str, ...]  # gin overrides of the pretraining
    finetune: tuple[str, ...]  # gin overrides of every discriminative run


FULL = Size((), (), ())
_TINY_MODEL = ("--gin_file", "configs/model/l1h32a4.gin")
SMALL = Size(
    ("--num_users", "1500", "--num_items", "1600", "--requests_per_day", "600"),
    (*_TINY_MODEL, "--gin.EPOCHS=2"),
    (*_TINY_MODEL, "--gin.EPOCHS=1"),
)


def main(argv: list[str]) -> int:
    """Returns 0, or the exit status of the first command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=pathlib.Path, default=pathlib.Path("runs/quickstart"))
    parser.add_argument("--small", action="store_true", help="a tenth of the data, a tiny model: does it run at all?")
    parser.add_argument("--nproc", type=int, default=2, help="training processes (default 2)")
    args = parser.parse_args(argv)
    started_s = time.monotonic()
    try:
        rows = run(args.out_dir.resolve(), SMALL if args.small else FULL, args.nproc)
    except subprocess.CalledProcessError as error:
        command = shell(tuple(error.cmd[1:]))
        print(f"error: this command failed with status {error.returncode}:\n  {command}", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1
    except Stopped as error:
        print(f"stopped: {error}; the same command goes on from there", file=sys.stderr)
        return 130
    (args.out_dir / "summary.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    _print(rows)
    print(f"{args.out_dir / 'summary.json'} written after {time.monotonic() - started_s:.0f} s")
    print(f"curves: {sys.executable} -m tensorboard.main --logdir {args.out_dir}")
    return 0


def run(out_dir: pathlib.Path, size: Size, num_processes: int) -> list[dict]:
    """Runs all steps and returns the rows of the table. CalledProcessError names the command that failed."""
    raw, data = out_dir / "raw", out_dir / "data"
    if not (raw / "schema.toml").is_file():
        _python("data_pipeline.synthesize", "--out_dir", str(raw), *size.synthesize)
    _python("data_pipeline.build", "--source", "synthetic", "--raw_dir", str(raw), "--out_dir", str(data))
    common = (f"--gin.DATA_DIR={data}",)
    _train(num_processes, "pretrain", *common, f"--gin.OUTPUT_DIR={out_dir / 'pretrain'}", *size.pretrain)
    rows = []
    for strategy in STRATEGIES:
        folder = out_dir / strategy.lower()
        init = () if strategy == "NT" else (f"--gin.INIT_CHECKPOINT={out_dir / 'pretrain'}",)
        options = (*common, f"--gin.OUTPUT_DIR={folder}", f"--gin.STRATEGY={strategy}", *init, *size.finetune)
        _train(num_processes, "finetune", *options)
        metrics_file = folder / "test.json"
        scored = ("--checkpoint", str(folder), "--data", str(data))
        _python("gpsd_dist.evaluate", *scored, "--metrics_out", str(metrics_file))
        for task, metrics in json.loads(metrics_file.read_text()).items():
            row = {"strategy": strategy, "task": task, "split": "test"}
            rows.append(row | {name: metrics[name] for name in METRICS})
    return rows


def _train(num_processes: int, stage: str, *options: str) -> None:
    config = ("--gin_file", f"configs/experiments/quickstart_{stage}.gin")
    execute(python_command(num_processes, "gpsd_dist.train", *config, *options), say=_show)


def _python(module: str, *options: str) -> None:
    execute(("-m", module, *options), say=_show)


def _show(command: str) -> None:
    print(f"\n{command}", flush=True)


def _print(rows: list[dict]) -> None:
    table = rich.table.Table("strategy", "task", *METRICS, title="Test split")
    for row in rows:
        numbers = ["-" if row[m] is None else f"{row[m]:,}" if m == "rows" else f"{row[m]:.4f}" for m in METRICS]
        table.add_row(row["strategy"], row["task"], *numbers)
    rich.console.Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
