"""Measures how long a save stops training, in the background against in the foreground, in one run.

    python -m benchmarks.checkpoint_stall [--pairs 5] [--steps 10] [--out stall.json] -- ARGUMENTS OF gpsd_dist.train

Trains for real. Every `--steps` steps it saves, alternately at once and in the background; `steps_s` is the time of the
steps that follow a save: those after a background save share the machine with its writing. Also times the check of the
checksums of one checkpoint, and the loading of its tensors. Nothing is left in OUTPUT_DIR.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time

import rich.console
import rich.table

from gpsd_dist.checkpoint import integrity, loading
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.distributed.runtime import process_group
from gpsd_dist.trainer import Trainer


def measure(argv: list[str], pairs: int, steps: int) -> dict:
    """Returns {"sync" | "async": {"stall_s": [...], "steps_s": [...]}, "bytes", "verify_s", "load_s"}"""
    run = load_run_config([*argv, "--gin.OUTPUT_DIR=/unused"]).run
    with process_group(run.train.collective_timeout_s) as runtime, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(dataclasses.replace(run, output_dir=folder), runtime)
        trainer.metrics.open(0, trainer.total_steps)
        batches = trainer.batches()
        timings: dict = {kind: {"stall_s": [], "steps_s": []} for kind in ("sync", "async")}
        train_for(trainer, batches, steps)
        for index in range(2 * (pairs + 1)):
            kind = ("sync", "async")[index % 2]
            train = dataclasses.replace(run.train, async_checkpoints=kind == "async", keep_last=1)
            trainer.checkpoints._train = train
            trainer.checkpoints.wait()
            trainer.save({})
            steps_s = train_for(trainer, batches, steps)
            if index > 1:  # the first pair allocates memory and starts the group
                timings[kind]["stall_s"].append(trainer.checkpoints.stall_s)
                timings[kind]["steps_s"].append(steps_s)
        latest = trainer.checkpoints.latest()
        start_s = time.perf_counter()
        integrity.check(latest)
        verified_s = time.perf_counter()
        loading.fill_tensors(latest, trainer._tensors())
        loaded_s = time.perf_counter()
        size = sum(entry.num_bytes for entry in integrity.read_checksums(latest).files.values())
        trainer.loader.close()
        trainer.metrics.close()
        return timings | {"bytes": size, "verify_s": verified_s - start_s, "load_s": loaded_s - verified_s}


def train_for(trainer: Trainer, batches, steps: int) -> float:
    """Times these steps, in seconds."""
    start_s = time.perf_counter()
    for done in trainer.training_step.run_steps(batches, trainer.step, steps):
        trainer.step += 1
        trainer.metrics.record_step(done)
    return time.perf_counter() - start_s


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="saves of each kind (default: 5)")
    parser.add_argument("--steps", type=int, default=10, help="steps between saves (default: 10)")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    result = measure(argv[split + 1 :], args.pairs, args.steps)
    table = rich.table.Table("", "training waits, s", f"{args.steps} steps after it, s")
    for kind in ("sync", "async"):
        cells = [result[kind][name] for name in ("stall_s", "steps_s")]
        table.add_row(kind, *(f"{statistics.median(c):.3f} ({min(c):.3f} - {max(c):.3f})" for c in cells))
    rich.console.Console().print(table)
    ratios = [one / two for one, two in zip(result["sync"]["stall_s"], result["async"]["stall_s"], strict=True)]
    print(f"{result['bytes'] / 1e6:.1f} MB; sync / async, pair by pair: median {statistics.median(ratios):.1f}")
    print(f"check of the checksums {result['verify_s']:.3f} s, then loading {result['load_s']:.3f} s")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
