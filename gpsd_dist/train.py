"""ENTRY: trains one run. `torchrun --nproc_per_node 2 -m gpsd_dist.train --gin_file configs/stage/pretrain.gin ...`

Read this first: argv -> RunConfig -> process group -> Trainer -> load_weights() -> train().
"""

import dataclasses
import json
import logging
import pathlib
import sys

from gpsd_dist import exit_codes, output_folder
from gpsd_dist.capacity.frozen import expected_rows, frozen_line
from gpsd_dist.checkpoint import storage
from gpsd_dist.checkpoint.manager import folder_of
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.launching import LauncherGone
from gpsd_dist.distributed.runtime import Runtime, process_group
from gpsd_dist.distributed.sharding import Cluster
from gpsd_dist.gin_cli import ParsedRun, load_run_config
from gpsd_dist.model_options import size_text
from gpsd_dist.provenance import environment
from gpsd_dist.trainer import Trainer
from gpsd_dist.training_step import LossNotFinite

log = logging.getLogger("gpsd_dist.train")


def main(argv: list[str]) -> int:
    """The exit status: one of `exit_codes`."""
    trainer = None
    try:
        parsed = load_run_config(argv)
        run = parsed.run
        checkpoints = folder_of(run.output_dir, run.train)
        with (
            process_group(run.train.collective_timeout_s) as runtime,
            output_folder.held(run.output_dir, runtime, checkpoints=checkpoints),
        ):
            trainer = Trainer(run, runtime)
            trainer.load_weights()  # the last that can be refused: a folder with a description is a run
            if runtime.is_main:
                _describe(parsed, trainer, runtime)
            trainer.train()
            return exit_codes.FINISHED if trainer.progression.is_finished else trainer.stops.exit_code
    except LauncherGone as error:
        return _failed(error, exit_codes.FAILED)
    except LossNotFinite as error:  # an unstable run shows it again, a broken device does not
        return _failed(error, exit_codes.FAILED)
    except ValueError as error:
        return _failed(error, exit_codes.MISTAKE)
    except OSError as error:
        last = trainer.checkpoints.latest() if trainer is not None else None
        safe = f". Safe: {last}; the same command goes on from there" if last is not None else ""
        return _failed(f"{error}{safe}", exit_codes.NO_FILE_ACCESS)


def _failed(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return status


def _describe(parsed: ParsedRun, trainer: Trainer, runtime: Runtime) -> None:
    """Writes what the run is into its folder, and the same in short to the log."""
    run: RunConfig = parsed.run
    folder = pathlib.Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tables = trainer.assembly.tables
    plan = [*tables.plan.splitlines(), *filter(None, [_saved_by_freezing(trainer, runtime)])]
    texts = {
        "config.gin": parsed.gin_text,
        "run_config.json": json.dumps(dataclasses.asdict(run), indent=1),
        "plan.txt": "\n".join(plan) + "\n",
        "environment.json": json.dumps(environment(runtime), indent=1),
    }
    for name, text in texts.items():  # whole or not at all: run_config.json says where the checkpoints are
        storage.write(folder / name, text.encode())
    sparse = sum(weight.size()[0] * tables.width for weight in tables.weights().values())
    dense = sum(parameter.numel() for parameter in trainer.model.parameters())
    devices = f"{runtime.world_size} x {runtime.device.type}"
    model = f"{run.model.name} {size_text(dataclasses.asdict(run.model))}"
    log.info("run %s: %s %s, %s on %s", folder, run.stage, run.strategy, model, devices)
    log.info("parameters: %s in tables, %s dense", f"{sparse:,}", f"{dense:,}")
    for line in plan:
        log.info("%s", line)
    epochs = f"{trainer.loader.steps_per_epoch} per epoch x {run.train.epochs} epochs"
    log.info("steps: %s, %d in all, warm-up %d", epochs, trainer.total_steps, trainer.warmup_steps)


def _saved_by_freezing(trainer: Trainer, runtime: Runtime) -> str:
    """One line; empty if nothing is frozen."""
    run, manifest, assembly = trainer.run, trainer.manifest, trainer.assembly
    if not run.freezes_tables:
        return ""
    rows = expected_rows(run, manifest, assembly.lookup_names, runtime.world_size)
    cluster = Cluster(runtime.world_size, runtime.local_world_size, runtime.device.type)
    return frozen_line(run, manifest, assembly.tables.shards, rows, cluster)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
