"""ENTRY: trains one run. `torchrun --nproc_per_node 2 -m gpsd_dist.train --gin_file configs/stage/pretrain.gin ...`

Read this first: argv -> RunConfig -> process group -> Trainer -> load_weights() -> train().
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.train ...")

from gpsd_dist.cli.main import run_main
from gpsd_dist.config.gin_cli import ParsedRun, load_run_config
from gpsd_dist.disk.text import say_error
from gpsd_dist.distributed import exit_codes
from gpsd_dist.distributed.exit_codes import LossNotFinite
from gpsd_dist.distributed.parent_watch import LauncherGone
from gpsd_dist.stages import registry


def parse(argv: list[str]) -> ParsedRun:
    """Parses the options, without importing torch. ValueError for a mistake in them."""
    parsed = load_run_config(argv)
    registry.check(parsed.run.stage)  # a misspelt one is refused before the folder of the run is made
    return parsed


def main(argv: list[str]) -> int:
    """Trains the run that the options describe, and returns the exit status: one of `exit_codes`."""
    trainer = None
    try:
        parsed = parse(argv)
        run = parsed.run
        # Imported here and not above: torch and TorchRec take seconds, and `--help` or a misspelt option needs neither.
        from gpsd_dist import run_description, run_outcome
        from gpsd_dist.checkpoint import output_lock
        from gpsd_dist.checkpoint.manager import folder_of
        from gpsd_dist.distributed.runtime import process_group
        from gpsd_dist.trainer import Trainer

        # The lock is taken before anything is built: two jobs in one folder would mix their checkpoints, and the second
        # one must learn it in seconds, not after planning and reading.
        with (
            process_group(run.train.collective_timeout_s) as runtime,
            output_lock.held(run.output_dir, checkpoints=folder_of(run.output_dir, run.train)),
        ):
            trainer = Trainer(run, runtime)
            # Nothing after this can reject the run. Only now is run_config.json written: a folder that has one counts
            # as a run.
            trainer.load_weights()
            # A finished run stays as it was described: by the command and commit that trained it.
            if runtime.is_main and not trainer.early_stopping.is_finished:
                run_description.write(parsed.gin_text, trainer, runtime)
            best = trainer.train()
        if not trainer.early_stopping.is_finished:
            return trainer.stops.exit_code
        if runtime.is_main:
            # Outside of the group: the floors take rank 0 some seconds, in which the others need not wait.
            run_outcome.say(trainer, best, argv)
        return exit_codes.FINISHED
    # A loss that is not finite is no MISTAKE, though a ValueError: the launcher may try once more. An unstable run
    # shows it again, a broken device does not.
    except (LauncherGone, LossNotFinite) as error:
        return say_error(error, exit_codes.FAILED)
    except ValueError as error:
        return say_error(error)
    except OSError as error:
        # A status of its own, because a full disk or a lost store is no mistake in the options: once it is back, the
        # same command goes on.
        last = trainer.checkpoints.latest() if trainer is not None else None
        safe = f". Safe: {last}; the same command goes on from there" if last is not None else ""
        return say_error(OSError(f"{error}{safe}"), exit_codes.NO_FILE_ACCESS)


if __name__ == "__main__":
    sys.exit(run_main(main))
