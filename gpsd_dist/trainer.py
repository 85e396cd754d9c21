"""The run, top to bottom: wire the parts, choose where weights come from, loop over steps, validate, save."""

import collections
import contextlib
import dataclasses
import itertools
import logging
import typing

import torch

from gpsd_dist.assembly import assemble
from gpsd_dist.batch.batch import Batch, pinned
from gpsd_dist.checkpoint.loading import fill_tensors
from gpsd_dist.checkpoint.manager import Checkpoints, RunState, newest_intact
from gpsd_dist.checkpoint.resume import check_resumable, epochs_to_best
from gpsd_dist.checkpoint.state import read_run, read_state
from gpsd_dist.checkpoint.transfer import transfer
from gpsd_dist.config import RunConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.loader import Loader
from gpsd_dist.data.run_manifest import read_run_manifest
from gpsd_dist.distributed.collectives import all_sum
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.distributed.stopping import StopRequests
from gpsd_dist.metrics import profiling
from gpsd_dist.metrics.early_stopping import Progression
from gpsd_dist.metrics.progress_bar import Progress
from gpsd_dist.metrics.recorder import Recorder
from gpsd_dist.metrics.throughput import Throughput
from gpsd_dist.optim import learning_rate_factor, named_state
from gpsd_dist.preflight import check_options_against_data
from gpsd_dist.scoring import Metrics, evaluate_split, evaluation_loader
from gpsd_dist.tables.prefetch import SparseDistPipeline
from gpsd_dist.training_step import PipelinedStep, TrainingStep

log = logging.getLogger(__name__)


class Trainer:
    """Wires the components in TorchRec's order and runs the loop. What one step does: `training_step.py`."""

    def __init__(self, run: RunConfig, runtime: Runtime):
        """Collective. Builds everything with random weights; `load_weights` decides where weights come from."""
        self.run, self.runtime = run, runtime
        self.manifest = read_run_manifest(run)
        check_options_against_data(run, self.manifest)
        self.assembly = assemble(run, self.manifest, runtime)
        self.loader = self._training_loader()
        self.validates = not run.refit_of and self.manifest.split("valid").num_rows > 0
        self._valid_content = ""
        if self.validates:  # is it readable?
            with contextlib.closing(
                evaluation_loader(run, self.manifest, self.assembly.lookup_names, "valid", runtime)
            ) as valid:
                self._valid_content = valid.state_dict()["order"]["content"]
        self.checkpoints = Checkpoints(run.output_dir, runtime, run.train)
        self.start = newest_intact(self.checkpoints.folder)
        if self.start is not None:  # before anything is written into the folder of another run
            state = read_run(self.start)
            check_resumable(dataclasses.asdict(run), dataclasses.asdict(self.manifest), state, self.start)
        self.throughput = Throughput()
        self.profiler = profiling.StepProfiler(run, runtime, self.assembly.model.backbone)
        self.training_step = TrainingStep(run, runtime, self.assembly, self.profiler, self.checkpoints.latest)
        self.model, self.optimizer = self.training_step.model, self.training_step.optimizer
        self.progression = Progression()
        self.step = 0
        self._has_weights = False
        steps_per_epoch = self.loader.steps_per_epoch
        self.schedule_steps = run.train.epochs * steps_per_epoch
        self.total_steps = min(self.schedule_steps, run.train.max_steps or self.schedule_steps)
        if run.refit_of:
            epochs = epochs_to_best(dataclasses.asdict(run), dataclasses.asdict(self.manifest))
            self.total_steps = min(self.total_steps, max(1, round(epochs * steps_per_epoch)))
        self.eval_interval_steps = max(1, steps_per_epoch // run.train.eval_per_epoch)
        self.warmup_steps = int(run.train.warmup_fraction * self.schedule_steps)
        self._since_validation: tuple[torch.Tensor, torch.Tensor] | None = None
        self._pipeline: SparseDistPipeline | None = None
        self._prefetched_positions: collections.deque[dict[str, int]] = collections.deque()
        self._position: dict[str, int] = {}  # of the last batch trained, where the loader is ahead of it
        self.stops = StopRequests()

    def train(self) -> dict[str, float]:
        """Runs to the end, from the newest checkpoint if there is one; returns the best validation. Collective."""
        if not self._has_weights:
            self.load_weights()
        if self.progression.is_finished:
            log.info("this run is finished (best step %d); nothing to do", self.progression.best_step)
            return self._best_metrics()
        watchdog, timeout_s = self.runtime.watchdog, self.run.train.hang_timeout_s
        orphaned = self.stops.note_orphaned
        with self.stops, watchdog.watching(timeout_s, self.step, orphaned), self.checkpoints:  # waits for the last save
            self._loop()
        return self._best_metrics()

    def _loop(self) -> None:
        progress = Progress(self.total_steps, first_step=self.step) if self.runtime.is_main else None
        recorder = Recorder(
            self.run.output_dir,
            self.runtime.rank,
            resume_step=self.step or None,
            progress=progress,
            device=self.runtime.device,
        )
        self.throughput.restart()
        self.profiler.start()
        while not self.progression.is_finished:
            for _ in self._steps(recorder):
                self.profiler.after_step()
                is_last, is_stopping = self.step >= self.total_steps, self.stops.agreed()
                if self.step % self.run.train.log_interval_steps == 0 or is_last:
                    self.runtime.watchdog.note("metrics of all ranks", is_collective=True)
                    self.throughput.record_to(recorder)
                    recorder.log(self.step, self.step / self.loader.steps_per_epoch)
                if is_last and not self.validates:
                    self._finish_unvalidated()
                elif is_last or (self.step % self.eval_interval_steps == 0 and self.validates):
                    self._validate(recorder, is_last)
                elif is_stopping or self._save_is_due():
                    self._save({})
                recorder.advance(self.step)
                if self.progression.is_finished or is_stopping:
                    break
            if is_stopping and not self.progression.is_finished:
                self.checkpoints.wait()
                log.warning("asked to stop: saved step %d; the same command goes on from there", self.step)
                break
        self.profiler.close()
        self.loader.close()
        recorder.close()

    def _steps(self, recorder: Recorder) -> typing.Iterator[None]:
        """Trains; an item per step done. Ends with the epoch, or with the prefetched batches. Collective."""
        if self.run.execution.pipeline == "sparse_dist":
            yield from self._prefetched_steps(recorder)
            return
        for batches in self._waited(self.loader):
            with self.profiler.range(profiling.STEP):
                self._train_step(batches, recorder)
            yield

    def _train_step(self, batches: tuple[Batch, ...], recorder: Recorder) -> None:
        """One optimizer step, with the learning rate of its place in the schedule. Collective."""
        sums, counts = self.training_step(batches, self.step, self._lr_factor(), recorder)
        self._after_step(batches, sums, counts, recorder)

    def _prefetched_steps(self, recorder: Recorder) -> typing.Iterator[None]:
        """Up to the next validation, which needs the tables without batches under way. Collective."""
        if self._pipeline is None:
            hooks = PipelinedStep(self.training_step, lambda: self.step, self._lr_factor, recorder)
            self._pipeline = SparseDistPipeline(self.assembly.tables, hooks, self.runtime.device)
        interval = self.eval_interval_steps
        pause = self.step + interval - self.step % interval if self.validates else self.total_steps
        source = itertools.islice(self._endless(), min(pause, self.total_steps) - self.step)
        steps = self._pipeline.steps(source)
        while True:
            with self.profiler.range(profiling.STEP):
                done = next(steps, None)
            if done is None:
                return
            self._position = self._prefetched_positions.popleft()
            parts, sums, counts = done
            self._after_step(parts, sums, counts, recorder)
            yield

    def _endless(self) -> typing.Iterator[tuple[Batch, ...]]:
        """Batches of this epoch and those after it; notes where each one stands, for they are taken ahead of use."""
        while True:
            for batches in self._waited(self.loader):
                self._prefetched_positions.append({"epoch": self.loader.epoch, "step": self.loader.step})
                yield batches

    def _lr_factor(self) -> float:
        final = self.run.train.final_lr_fraction
        return learning_rate_factor(self.step, self.schedule_steps, self.warmup_steps, final)

    def _after_step(self, batches: tuple[Batch, ...], sums: torch.Tensor, counts: torch.Tensor, recorder) -> None:
        self.step += 1
        self._record(recorder, batches, sums, counts)

    def _record(self, recorder: Recorder, batches: tuple[Batch, ...], sums: torch.Tensor, counts: torch.Tensor) -> None:
        total = 0.0
        for index, (name, weight) in enumerate(self.assembly.objective.weights.items()):
            # counts are global already: the mean over ranks of world size * sum / count is the global mean
            mean = sums[index] * self.runtime.world_size / counts[index].clamp(min=1)
            recorder.record(f"train/{name}_loss", mean)
            total = total + weight * mean
        recorder.record("train/loss", total)
        since = self._since_validation
        self._since_validation = (sums, counts) if since is None else (since[0] + sums, since[1] + counts)
        self.throughput.step(
            sum(batch.num_requests for batch in batches), sum(batch.packing.num_history_tokens for batch in batches)
        )

    def _record_gap(self, recorder: Recorder, metrics: Metrics) -> None:
        """Generalization gap: log loss on `valid` minus mean training loss since the last validation. Collective."""
        if self._since_validation is None or self.run.stage == "pretrain":
            return
        sums, counts = self._since_validation
        means = dict(zip(self.assembly.objective.weights, all_sum(sums) / counts.clamp(min=1), strict=True))
        for task in self.assembly.tasks:
            if not (self.run.finetune.esmm and task.given):  # trained on another quantity than it is scored on
                gap = metrics[task.name]["log_loss"] - means[task.name]
                recorder.record(f"gap/{task.name}_log_loss", gap, reduce="last")
        self._since_validation = None

    def _waited(self, loader: Loader):
        """Batches of the rest of an epoch, with the time spent waiting for them counted."""
        iterator = iter(loader)
        while True:
            self.runtime.watchdog.note(profiling.DATA_WAIT, step=self.step + 1)
            with self.throughput.data_wait(), self.profiler.range(profiling.DATA_WAIT):
                batches = next(iterator, None)
            if batches is None:
                return
            yield batches

    def _validate(self, recorder: Recorder, is_last: bool) -> None:
        """Scores `valid`, judges it, saves. Collective."""
        self.runtime.watchdog.note("validation", is_collective=True)
        self.training_step.check_last()
        metrics = evaluate_split(self.run, self.manifest, self.assembly, "valid", self.runtime)
        for task, values in metrics.items():
            recorder.record_all(f"valid/{task}", values)
        self._record_gap(recorder, metrics)
        default = "next_item/mrr" if self.run.stage == "pretrain" else f"{next(iter(metrics))}/auc"
        name = self.run.train.best_metric or default
        flat = {f"{task}/{key}": value for task, values in metrics.items() for key, value in values.items()}
        if name not in flat:
            raise ValueError(f"TrainConfig.best_metric {name!r} is not one of {sorted(flat)}")
        value, progression = flat[name], self.progression
        progression.judge(value, self.step)
        progression.is_finished = is_last or self._is_out_of_patience()
        best = f"best {progression.best_value:.5f} at step {progression.best_step}"
        log.info("step %d: valid %s %.5f (%s)", self.step, name, value, best)
        recorder.log(self.step, self.step / self.loader.steps_per_epoch)
        self._save(flat)
        self.throughput.restart()

    def _finish_unvalidated(self) -> None:
        """The last step is the result: `valid` was trained on, or has no rows. Collective."""
        self.progression.best_step, self.progression.is_finished = self.step, True
        why = f"trained on train+valid as long as {self.run.refit_of}" if self.run.refit_of else "there is no valid row"
        log.info("step %d: %s; this is the result", self.step, why)
        self._save({})

    def _save_is_due(self) -> bool:
        interval = self.run.train.save_interval_steps
        return interval > 0 and self.step % interval == 0

    def _is_out_of_patience(self) -> bool:
        return 0 < self.run.train.patience <= self.progression.stale

    def _save(self, metrics: dict[str, float]) -> None:
        self.runtime.watchdog.note("checkpoint", is_collective=True)
        self.training_step.check_last()
        state = RunState(
            step=self.step,
            data_position=self.loader.state_dict() | self._position | {"valid_content": self._valid_content},
            progress=dataclasses.asdict(self.progression),
            metrics=metrics,
            run_config=dataclasses.asdict(self.run),
            manifest=dataclasses.asdict(self.manifest),
            world_size=self.runtime.world_size,
        )
        self.checkpoints.save(self._tensors(), state)

    def _tensors(self) -> dict:
        """Everything that a resumed run needs, aliasing the live state."""
        parts = self.assembly.weights() | {
            "table_optimizer": self.assembly.tables.optimizer_state(),
            "dense_optimizer": named_state(self.optimizer, self.model),
        }
        # an empty part (a rank without a piece of a trainable table) would be looked for under its own name by DCP
        return {name: part for name, part in parts.items() if part}

    def load_weights(self) -> None:
        """Own checkpoint, else transfer, else random. Says which. Collective. ValueError if they do not fit this run.

        `train` does it where nobody did before, to know that the run is accepted.
        """
        self._has_weights = True
        if self.start is not None:
            state = read_state(self.start)
            if state.data_position.get("valid_content", self._valid_content) != self._valid_content:
                raise ValueError(
                    f"{self.start} was judged on other rows: the files of split 'valid' in {self.run.data_dir} have "
                    "changed; use those of that run, or another OUTPUT_DIR"
                )
            fill_tensors(self.start, self._tensors())
            self.checkpoints.go_back_to(self.start)
            self.loader.load_state_dict(state.data_position)
            self.step, self.progression = state.step, Progression(**state.progress)
            self.progression.is_finished = self.step >= self.total_steps or self._is_out_of_patience()
            log.info("weights: resumed from %s", self.start)
        elif self.run.init_checkpoint:
            weights = self.assembly.weights()
            log.info("weights: %s", transfer(self.run, self.manifest, weights))
        else:
            log.info("weights: random, seed %d", self.run.seed)

    def _training_loader(self) -> Loader:
        run = self.run
        is_pretraining = run.stage == "pretrain"
        collate = Collate(
            self.manifest,
            self.assembly.lookup_names,
            run.data.max_history_length,
            with_candidates=not is_pretraining,
            negatives_per=run.pretrain.negatives_per if is_pretraining else None,
            num_negative_groups=run.pretrain.num_negative_groups,
            num_negatives=run.pretrain.num_negatives,
            seed=run.seed,
            num_parts=run.train.micro_batches,
            token_multiple=run.execution.token_multiple,
        )
        is_pinned = self.runtime.device.type == "cuda"

        def make_batch(rows, key):
            parts = collate(rows, key)
            return pinned(parts) if is_pinned else parts

        return Loader(
            run.data_dir,
            self.manifest,
            run.training_split,
            make_batch=make_batch,
            columns=collate.columns(),
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            num_data_shards=run.data.num_data_shards,
            global_batch_rows=run.data.global_batch_rows or None,
            global_batch_tokens=run.data.global_batch_tokens or None,
            max_history_length=run.data.max_history_length,
            seed=run.seed,
            num_threads=run.data.num_threads,
            prefetch=run.data.prefetch,
        )

    def _best_metrics(self) -> dict[str, float]:
        best = self.checkpoints.best()
        return {} if best is None else read_state(best).metrics
