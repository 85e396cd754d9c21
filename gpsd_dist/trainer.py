"""The run, top to bottom: wire the parts, choose where weights come from, loop over steps, validate, save."""

import contextlib
import dataclasses
import functools
import logging
import math
import typing

from gpsd_dist.assembly import assemble
from gpsd_dist.checkpoint import resume
from gpsd_dist.checkpoint.loading import fill_tensors
from gpsd_dist.checkpoint.manager import RunState, newest_intact
from gpsd_dist.checkpoint.saving import Checkpoints
from gpsd_dist.checkpoint.state import read_run, read_state
from gpsd_dist.checkpoint.transfer import transfer, with_frozen_rows
from gpsd_dist.config import RunConfig
from gpsd_dist.config.from_data import resolve
from gpsd_dist.data.loaders import evaluation_loader, training_loader
from gpsd_dist.data.run_manifest import read_run_manifest
from gpsd_dist.distributed import matmul_dtype
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.distributed.stopping import StopRequests
from gpsd_dist.metrics import profiling
from gpsd_dist.metrics.binary_metrics import LOSS_KEYS
from gpsd_dist.metrics.early_stopping import EarlyStopping
from gpsd_dist.metrics.training_metrics import TrainingMetrics
from gpsd_dist.optim import learning_rate_factor, named_state
from gpsd_dist.parameter_names import DENSE_LAST, DENSE_OPTIMIZER, TABLE_OPTIMIZER
from gpsd_dist.preflight import check_options_against_data
from gpsd_dist.stages.stage import evaluate_split
from gpsd_dist.training_step import Parts, TrainingStep

log = logging.getLogger(__name__)


class Trainer:
    """Wires the components in TorchRec's order and runs the loop. `training_step.py` has what one step does."""

    def __init__(self, run: RunConfig, runtime: Runtime):
        """Builds everything with random weights; `load_weights` decides where weights come from. Collective.

        Raises ValueError or OSError for what does not fit or cannot be read; nothing has been written then.
        """
        self.runtime = runtime
        self.checkpoints = Checkpoints(run.output_dir, runtime, run.train)
        # All ranks verify the files together and agree on one checkpoint: a rank that alone found a damaged file would
        # otherwise start from another step than the rest.
        self.start = newest_intact(self.checkpoints.folder)
        # A build may publish another version meanwhile, even between two ranks. A resumed run goes on with its own.
        run = resume.in_data_version(run, self.start)
        self.manifest = read_run_manifest(run)
        # Options that cannot fit the data are refused before tables are allocated, which may take minutes.
        check_options_against_data(run, self.manifest)
        # A resumed run goes on with the numbers that it began with, though the data may have grown since.
        saved = resume.saved_numbers(run, self.start)
        run, chosen = resolve(run, self.manifest, saved)
        if chosen:
            log.info("%s", chosen)
        run = with_frozen_rows(run, self.manifest, saved)
        run = resume.in_saved_revision(run, self.start)
        self.run = run = matmul_dtype.settle(run, saved, runtime)
        self.components = assemble(run, self.manifest, runtime)
        stage, names = self.components.stage, self.components.lookup_names
        self.loader = training_loader(run, self.manifest, names, runtime, with_candidates=stage.with_candidates)
        self.validates = not run.refit_of and self.manifest.split("valid").num_rows > 0
        self._valid_content = ""
        if self.validates:
            # Opened once here, so that an unreadable `valid` is found now and not after the first epoch.
            with contextlib.closing(evaluation_loader(run, self.manifest, names, "valid", runtime)) as valid:
                self._valid_content = valid.state_dict()["order"]["content"]
        if self.start is not None:
            # Refused before anything is written into the folder of another run.
            state = read_run(self.start)
            resume.check_resumable(dataclasses.asdict(run), dataclasses.asdict(self.manifest), state, self.start)
        self._plan_steps()
        self.profiler = profiling.StepProfiler(run, runtime, self.components.model)
        lr_factor = functools.partial(
            learning_rate_factor,
            total_steps=self.schedule_steps,
            warmup_steps=self.warmup_steps,
            final_fraction=run.train.final_lr_fraction,
        )
        self.training_step = TrainingStep(run, self.components, self.profiler, lr_factor, self.checkpoints.latest)
        self.model, self.optimizer = self.training_step.model, self.training_step.optimizer
        self.metrics = TrainingMetrics(run, runtime, stage, self.components.model, self.loader.steps_per_epoch)
        self.early_stopping = EarlyStopping()
        self.step = 0
        self.position: dict[str, int] = {}
        """Position in the data behind the last batch trained; the loader may be ahead of it."""
        self._has_weights = False
        self.stops = StopRequests()

    def train(self) -> dict[str, float]:
        """Runs to the last step, to early stopping, or to a stop request; returns the best validation. Collective.

        Begins at the newest checkpoint of the output folder if there is one.
        """
        if not self._has_weights:
            self.load_weights()
        if self.early_stopping.is_finished:
            log.info("this run is finished (best step %d); nothing to do", self.early_stopping.best_step)
            return self._best_metrics()
        batches = self.batches()
        must_stop = False
        with self._guarded():
            self.metrics.open(self.step, self.total_steps)
            # Entries of steps that a checkpoint contains are never written again: they must be on disk with it.
            self.checkpoints.before_commit = self.metrics.recorder.sync
            self.profiler.start()
            while not self.early_stopping.is_finished and not must_stop:
                for done in self.training_step.run_steps(batches, self.step, self._steps_to_next_pause()):
                    self.step += 1
                    # With prefetching the loader is ahead of the batch that was trained: save that one's place.
                    self.position = self.loader.position_after(*done.parts[0].epoch_and_step)
                    self.metrics.record_step(done)
                    self.profiler.after_step()
                    # A signal reaches ranks at different moments, so they agree, one step later, on where to stop:
                    # a rank that ended alone would leave the others waiting in the next collective.
                    is_last, must_stop = self.step >= self.total_steps, self.stops.agreed()
                    # Metrics stay on the device in between, because reading them makes the host wait for the GPU.
                    if is_last or self.step % self.run.train.log_interval_steps == 0:
                        self.metrics.log(self.step)
                    # Each case saves at most once: a validation saves with its scores, so `best` can point at the step.
                    if self.validates and (is_last or self.step % self.eval_interval_steps == 0):
                        self.validate(is_last)
                    elif is_last:
                        self._finish_unvalidated()
                    elif must_stop or self.step % self.save_interval_steps == 0:
                        self.save({})
                    if self.early_stopping.is_finished or must_stop:
                        break
            if must_stop and not self.early_stopping.is_finished:
                # Only now is the checkpoint complete: the message may promise what is on disk alone.
                self.checkpoints.wait()
                log.warning("asked to stop: saved step %d; the same command goes on from there", self.step)
            self.profiler.close()
            self.loader.close()
            if self.early_stopping.is_finished:
                self.checkpoints.wait()  # the best validation is read from its checkpoint
                self.metrics.finish(self._best_metrics(), self.early_stopping.best_step)
            self.metrics.close(is_finished=self.early_stopping.is_finished)
        return self._best_metrics()

    @contextlib.contextmanager
    def _guarded(self) -> typing.Iterator[None]:
        """Surrounds the loop: a signal asks for a stop, the watchdog looks for a hang, the last save is waited for."""
        watchdog, timeout_s = self.runtime.watchdog, self.run.train.hang_timeout_s
        watching = watchdog.watching(timeout_s, self.step, self.stops.note_orphaned)
        # Last in, first out: an error is then printed below the progress bar, and not into it.
        with self.stops, watching, self.checkpoints, contextlib.closing(self.metrics):
            yield

    def validate(self, is_last: bool) -> None:
        """Scores `valid`, updates early stopping, saves. Collective."""
        self.runtime.watchdog.note("validation", is_collective=True)
        # On a GPU the losses of most steps were not looked at. Weights that are NaN must be neither scored nor saved.
        self.training_step.check_last()
        with self.training_step.average.in_place():
            metrics = evaluate_split(self.run, self.manifest, self.components, "valid")
        self.metrics.record_validation(metrics)
        name = self.run.train.best_metric or self.components.stage.default_metric(metrics)
        flat = {f"{task}/{key}": value for task, values in metrics.items() for key, value in values.items()}
        if name not in flat:
            raise ValueError(f"TrainConfig.best_metric {name!r} is not one of {sorted(flat)}")
        # The metrics are equal on all ranks, bit by bit, so all of them decide alike and nothing is exchanged here.
        stopping = self.early_stopping
        if math.isnan(flat[name]):
            log.warning(
                "step %d: valid %s is not defined, so it can choose no checkpoint: valid has labels of one class only, "
                "or none; build the data with a longer valid period",
                self.step,
                name,
            )
        # Early stopping looks for the largest value, so it and the checkpoints keep a loss with its sign turned.
        sign = -1 if name.rpartition("/")[2] in LOSS_KEYS else 1
        stopping.update(sign * flat[name], self.step, in_warmup=self.step <= self.warmup_steps)
        stopping.is_finished = is_last or stopping.is_out_of_patience(self.run.train.patience)
        best = f"best {sign * stopping.best_value:.5f} at step {stopping.best_step}"
        log.info("step %d: valid %s %.5f (%s)", self.step, name, flat[name], best)
        self.metrics.log(self.step, with_rates=False)
        self.save(flat)
        # The next rates shall be those of training steps, without the time of this pass.
        self.metrics.throughput.restart()

    def save(self, metrics: dict[str, float]) -> None:
        """Saves weights, optimizers, place in the data, options and `metrics` in the background. Collective."""
        self.runtime.watchdog.note("checkpoint", is_collective=True)
        self.training_step.check_last()
        state = RunState(
            step=self.step,
            # The content of `valid` goes along: a resumed run must compare its scores with those of the same rows.
            data_position=self.loader.state_dict() | self.position | {"valid_content": self._valid_content},
            progress=dataclasses.asdict(self.early_stopping),
            metrics=metrics,
            run_config=dataclasses.asdict(self.run),
            manifest=dataclasses.asdict(self.manifest),
            world_size=self.runtime.world_size,
        )
        # Whoever reads the checkpoint finds the weights that were validated under the names of weights.
        with self.training_step.average.in_place():
            self.checkpoints.save(self._tensors(), state)

    def load_weights(self) -> None:
        """Loads the own checkpoint, else transfers, else keeps random weights, and says which. Collective.

        ValueError if they do not fit this run. `train` calls it where nobody did, to know that the run is accepted.
        """
        self._has_weights = True
        # The own checkpoint comes first: a restarted finetuning goes on, and does not begin again from pretraining.
        if self.start is not None:
            state = read_state(self.start)
            if state.data_position.get("valid_content", self._valid_content) != self._valid_content:
                raise ValueError(
                    f"{self.start} was judged on other rows: the files of split 'valid' in {self.run.data_dir} have "
                    "changed; use those of that run, or another OUTPUT_DIR"
                )
            with self.training_step.average.in_place():
                fill_tensors(self.start, self._tensors())
            # Later checkpoints, if any, are damaged. Set aside, they cannot be taken for the newest one again.
            self.checkpoints.go_back_to(self.start)
            self.loader.load_state_dict(state.data_position)
            self.step, self.early_stopping = state.step, EarlyStopping(**state.progress)
            is_out = self.early_stopping.is_out_of_patience(self.run.train.patience)
            self.early_stopping.is_finished = self.step >= self.total_steps or is_out
            log.info("weights: resumed from %s", self.start)
        elif self.run.init_checkpoint:
            log.info("weights: %s", transfer(self.run, self.manifest, self.components.weights()))
        else:
            log.info("weights: random, seed %d", self.run.seed)

    def _plan_steps(self) -> None:
        run, steps_per_epoch = self.run, self.loader.steps_per_epoch
        self.schedule_steps = run.train.epochs * steps_per_epoch
        # The schedule is that of all epochs, also where max_steps stops earlier: a run that goes on with a larger
        # max_steps has then had the learning rates of the uninterrupted one.
        self.total_steps = min(self.schedule_steps, run.train.max_steps or self.schedule_steps)
        if run.refit_of:
            # There is nothing left to validate on: the run that is repeated says how long to train.
            epochs = resume.epochs_to_best(dataclasses.asdict(run), dataclasses.asdict(self.manifest))
            self.total_steps = min(self.total_steps, max(1, round(epochs * steps_per_epoch)))
        self.eval_interval_steps = max(1, steps_per_epoch // run.train.eval_per_epoch)
        # A validation saves; without any, a crash shall lose an epoch at most.
        pause = self.total_steps if self.validates else steps_per_epoch
        self.save_interval_steps = run.train.save_interval_steps or pause
        self.warmup_steps = int(run.train.warmup_fraction * self.schedule_steps)

    def batches(self) -> typing.Iterator[Parts]:
        """Hands out the batches of this epoch and those after it, without end."""
        while True:
            iterator = iter(self.loader)
            while True:
                self.runtime.watchdog.note(profiling.DATA_WAIT, step=self.step + 1)
                with self.profiler.range(profiling.DATA_WAIT), self.metrics.throughput.data_wait():
                    parts = next(iterator, None)
                if parts is None:
                    break
                yield parts

    def _steps_to_next_pause(self) -> int:
        """Counts the steps to the next validation, which needs the tables without prefetched batches, or to the end."""
        interval = self.eval_interval_steps
        pause = self.step + interval - self.step % interval if self.validates else self.total_steps
        return min(pause, self.total_steps) - self.step

    def _finish_unvalidated(self) -> None:
        """Saves the last step as the result: `valid` was trained on, or has no rows. Collective."""
        self.early_stopping.best_step, self.early_stopping.is_finished = self.step, True
        why = f"trained on train+valid as long as {self.run.refit_of}" if self.run.refit_of else "there is no valid row"
        log.info("step %d: %s; this is the result", self.step, why)
        self.save({})

    def _tensors(self) -> dict:
        """Collects everything that a resumed run needs, aliasing the live state."""
        parts = self.components.weights() | {
            TABLE_OPTIMIZER: self.components.tables.optimizer_state(),
            DENSE_OPTIMIZER: named_state(self.optimizer, self.model),
            DENSE_LAST: self.training_step.average.other,
        }
        # An empty part (a rank without a piece of a trainable table) would be looked for under its own name by DCP.
        return {name: part for name, part in parts.items() if part}

    def _best_metrics(self) -> dict[str, float]:
        best = self.checkpoints.best()
        return {} if best is None else read_state(best).metrics
