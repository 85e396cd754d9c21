"""Turns the results of steps and validations into metrics: losses, rates, generalization gap.

`recorder.py` reduces them over ranks and writes them. Shape letter: L losses of the stage.
"""

import dataclasses
import math
import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.collectives import all_sum
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.flops import StepFlops
from gpsd_dist.metrics.progress_bar import ProgressBar
from gpsd_dist.metrics.recorder import Recorder
from gpsd_dist.metrics.throughput import Throughput
from gpsd_dist.validation import flattened


@dataclasses.dataclass
class StepResult:
    """Holds the result of one optimizer step. Tensors stay on their device, so there is no GPU sync."""

    parts: tuple[Batch, ...]  # Batch that was trained on, in its micro-batches
    number: int  # Step number, from 0 over the whole run
    loss_sums_L: torch.Tensor  # float32 sums of this rank
    counts_L: torch.Tensor  # float32 counts over all ranks
    learning_rate: float  # Learning rate of the dense part
    gradient_norm: torch.Tensor | None = None
    """Gradient norm of the dense part before clipping; None if nothing is clipped."""
    id_facts: dict[str, float] = dataclasses.field(default_factory=dict)
    """`IdRemapper.metrics`: how full managed tables are, how many ids have no row."""


def divisor(count_L: torch.Tensor) -> torch.Tensor:
    """Returns the counts, with 1 for a loss that nothing counts for: its sum is 0, and so is its mean."""
    # Not clamped to 1: a count is a sum of sample weights, where there are some, and may be small.
    return torch.where(count_L > 0, count_L, 1.0)


class Losses(typing.Protocol):
    """Names the losses of a stage."""

    loss_weights: dict[str, float]  # Name -> weight
    scored_losses: tuple[str, ...]  # Those with a task of that name, for the generalization gap


class TrainingMetrics:
    """Collects the metrics of one training run; every rank has one, rank 0 writes and shows them."""

    def __init__(self, run: RunConfig, runtime: Runtime, losses: Losses, model: nn.Module, steps_per_epoch: int):
        """`losses` is the stage; `model` is not wrapped yet, and its sizes are counted."""
        self.run, self.runtime, self.steps_per_epoch = run, runtime, steps_per_epoch
        self.loss_weights, self.scored_losses = losses.loss_weights, losses.scored_losses
        self.flops = StepFlops(run, model, runtime.device)
        self.throughput = Throughput(peak_flops_per_s=self.flops.peak)
        self.recorder: Recorder | None = None
        self._bar: ProgressBar | None = None
        self._since_validation: tuple[torch.Tensor, torch.Tensor] | None = None

    def open(self, first_step: int, total_steps: int) -> None:
        """Opens the files of rank 0, removes entries that a killed run wrote after `first_step`, starts the clock."""
        self._bar = ProgressBar(total_steps, first_step=first_step) if self.runtime.is_main else None
        self.recorder = Recorder(
            self.run.output_dir,
            self.runtime.rank,
            resume_step=first_step or None,
            progress=self._bar,
            device=self.runtime.device,
        )
        options = flattened(dataclasses.asdict(self.run))
        self.recorder.describe(options, self.run.train.mlflow_uri, is_resumed=first_step > 0)
        self.throughput.restart()

    def finish(self, best: dict[str, float], step: int) -> None:
        """Writes the best validation of a finished run for trackers of experiments. Not collective."""
        known = {name: value for name, value in best.items() if value is not None and math.isfinite(value)}
        self.recorder.finish(known, step)

    def record_step(self, done: StepResult) -> None:
        """Records losses and rates of one step. Not collective, no GPU sync."""
        total: typing.Any = 0.0
        for index, (name, weight) in enumerate(self.loss_weights.items()):
            # Sums are of this rank, counts are global. The recorder averages over ranks, so multiplying by the world
            # size makes that average the global sum over the global count.
            mean = done.loss_sums_L[index] * self.runtime.world_size / divisor(done.counts_L[index])
            self.recorder.record(f"train/{name}_loss", mean)
            total = total + weight * mean
        self.recorder.record("train/loss", total)
        self.recorder.record("train/dense_lr", done.learning_rate, reduce="last")
        if done.gradient_norm is not None:
            self.recorder.record("train/gradient_norm", done.gradient_norm)
        for name, value in done.id_facts.items():
            self.recorder.record(name, value, reduce="last")
        since, now = self._since_validation, (done.loss_sums_L, done.counts_L)
        self._since_validation = now if since is None else (since[0] + now[0], since[1] + now[1])
        requests = sum(batch.packing.num_requests for batch in done.parts)
        tokens = sum(batch.num_read_tokens for batch in done.parts)
        self.throughput.step(requests, tokens, self.flops(done.parts))
        if self._bar is not None:
            self._bar.advance(done.number + 1)

    def record_validation(self, metrics: dict[str, dict[str, float | int]]) -> None:
        """Records the metrics of `valid` and the generalization gap. Collective.

        The gap is log loss on `valid` minus the mean training loss since the last validation.
        """
        for task, values in metrics.items():
            for name, value in values.items():
                self.recorder.record(f"valid/{task}/{name}", value, reduce="last")  # equal on all ranks
        if self._since_validation is None or not self.scored_losses:
            return
        sums_L, counts_L = self._since_validation
        means = dict(zip(self.loss_weights, all_sum(sums_L) / divisor(counts_L), strict=True))
        for name in self.scored_losses:
            self.recorder.record(f"gap/{name}_log_loss", metrics[name]["log_loss"] - means[name], reduce="last")
        self._since_validation = None

    def log(self, step: int, *, with_rates: bool = True) -> None:
        """Reduces, writes and shows what was recorded since the last call. Collective, GPU sync."""
        if with_rates:
            self.runtime.watchdog.note("metrics of all ranks", is_collective=True)
            self.throughput.record_to(self.recorder)
        self.recorder.log(step, step / self.steps_per_epoch)

    def close(self, *, is_finished: bool = False) -> None:
        """Closes files and progress bar, if they are open; may be called twice."""
        if self.recorder is not None:
            self.recorder.close(is_finished=is_finished)
