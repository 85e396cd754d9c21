"""One optimizer step: counts, one lookup, forward and backward, update of tables and dense part."""

import dataclasses
import typing

import torch

from gpsd_dist.assembly import Assembly
from gpsd_dist.batch.batch import Batch, to_device
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.collectives import all_sum
from gpsd_dist.distributed.dense_parallel import clip_gradients, exchange_gradients, parallelize
from gpsd_dist.distributed.runtime import Runtime, seed_step
from gpsd_dist.metrics import profiling
from gpsd_dist.metrics.recorder import Recorder
from gpsd_dist.optim import dense_optimizer


class LossNotFinite(ValueError):
    """Names rank, step and the last good checkpoint."""


class TrainingStep:
    """Owns zero_grad, clip and step of both optimizers; the trainer owns the number of the step."""

    def __init__(
        self,
        run: RunConfig,
        runtime: Runtime,
        assembly: Assembly,
        profiler: profiling.StepProfiler,
        last_good: typing.Callable[[], Location | None],
    ):
        """Collective. Puts the model into training mode. `last_good`: the newest checkpoint, for an error message."""
        self.run, self.runtime, self.assembly, self.profiler = run, runtime, assembly, profiler
        if run.train.bf16 and runtime.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # losses stay in float32: TF32 keeps 10 bits
        self.model = assembly.model.train()
        self.parallel = parallelize(self.model, run, runtime)
        self.optimizer = dense_optimizer(self.model, run.dense)
        # here, because a copy to a GPU makes the host wait
        self._loss_weights = torch.tensor(list(assembly.objective.weights.values()), device=runtime.device)
        self._last_good = last_good
        self._last_losses: tuple[torch.Tensor, torch.Tensor, int] | None = None

    def __call__(
        self, batches: tuple[Batch, ...], step: int, lr_factor: float, recorder: Recorder
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One lookup and one or more parts of a batch (gradient accumulation). Collective.

        `lr_factor` times the peak is the learning rate. Returns this rank's loss sums [L] and the counts [L] over all
        ranks. LossNotFinite if a loss is not finite: no weight has moved then.
        """
        self.begin(step, lr_factor, recorder)
        batches = self.assembly.ids.train(to_device(batches, self.runtime.device))
        for name, value in self.assembly.ids.metrics().items():
            recorder.record(name, value, reduce="last")
        counts = self._counts(batches)
        sums = self._backward(batches, counts, step)  # updates the tables
        self.update(recorder)
        return sums, counts

    def begin(self, step: int, lr_factor: float, recorder: Recorder) -> None:
        """Before everything else of a step."""
        seed_step(self.run.seed, step, self.runtime.rank)
        self._set_learning_rates(lr_factor, recorder)
        self.optimizer.zero_grad()

    def update(self, recorder: Recorder) -> None:
        """After the backward: clips, and moves the dense part."""
        with self.profiler.range(profiling.OPTIMIZER):
            if self.run.train.clip_norm:
                recorder.record("train/gradient_norm", clip_gradients(self.model, self.run.train.clip_norm))
            self.optimizer.step()

    def joined_loss(
        self, rows: dict[str, torch.Tensor], batches: tuple[Batch, ...], step: int
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """For a pipeline that calls backward itself: the loss of the last part, joined to the tables. Collective.

        Parts before the last are done, with their backward; that of the returned scalar adds the last part's gradients
        and updates the tables, with the same bits as `__call__`. Also returns (sums, counts).
        """
        counts = self._counts(batches)
        scale = self._scale(counts)
        sums = torch.zeros_like(counts)
        leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in rows.items()}
        for batch in batches[:-1]:
            part = self._forward(leaves, batch, is_last=False)
            sums += part.detach()
            with self.profiler.range(profiling.BACKWARD):
                (part * scale).sum().backward()
        joined, anchor = join_rows(rows, leaves)
        part = self._forward(joined, batches[-1], is_last=True)
        sums += part.detach()
        self._check_finite(sums, counts, step)
        return (part * scale).sum() + anchor, (sums, counts)

    def _set_learning_rates(self, lr_factor: float, recorder: Recorder) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.dense.peak_lr * lr_factor
        self.assembly.tables.set_learning_rate(self.run.sparse.peak_lr * lr_factor)
        recorder.record("train/dense_lr", self.run.dense.peak_lr * lr_factor, reduce="last")

    def _backward(self, batches: tuple[Batch, ...], counts: torch.Tensor, step: int) -> torch.Tensor:
        """Gradients of the dense part, and the update of the tables, whose optimizer is fused into their backward.

        `counts` [L] are over all ranks. Returns this rank's loss sums [L].
        """
        scale = self._scale(counts)
        with self.profiler.range(profiling.LOOKUP):
            rows = self.assembly.tables(batches[0].lookup)
        leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in rows.items()}
        sums = torch.zeros_like(counts)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            part = self._forward(leaves, batch, is_last)
            sums += part.detach()
            if is_last:
                self._check_finite(sums, counts, step)
            with self.profiler.range(profiling.BACKWARD):
                (part * scale).sum().backward()
        trained = [name for name, value in rows.items() if value.requires_grad]
        # rows of a table that no loss reaches have no gradient, but every rank must join the exchange
        gradients = [torch.zeros_like(rows[n]) if leaves[n].grad is None else leaves[n].grad for n in trained]
        if trained:
            with self.profiler.range(profiling.TABLE_UPDATE):
                torch.autograd.backward([rows[name] for name in trained], gradients)
        return sums

    def _counts(self, batches: tuple[Batch, ...]) -> torch.Tensor:
        """[L] over all ranks. Collective."""
        with self.profiler.range(profiling.COLLECTIVES):
            return all_sum(sum(self.assembly.objective.counts(batch) for batch in batches))

    def _scale(self, counts: torch.Tensor) -> torch.Tensor:
        """[L] What a rank's loss sums are multiplied by. DDP and TorchRec both average gradients over ranks: times
        world size gives the sum over the global count.
        """
        return self._loss_weights * self.runtime.world_size / counts.clamp(min=1)

    def _forward(self, rows: dict[str, torch.Tensor], batch: Batch, is_last: bool) -> torch.Tensor:
        """Loss sums [L] of one part; gradients are exchanged with the last one alone."""
        exchange_gradients(self.parallel, is_last)
        if self.run.execution.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last replay gave is not needed any more
        autocast = torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=self.run.train.bf16)
        with autocast, self.profiler.range(profiling.FORWARD):
            return self.assembly.objective.sums(self.parallel, rows, batch)

    def _check_finite(self, sums: torch.Tensor, counts: torch.Tensor, step: int) -> None:
        """Before weights move. LossNotFinite names rank and step. On a GPU only in the steps after which metrics are
        logged: both wait for the GPU.
        """
        self._last_losses = sums, counts, step
        if not sums.is_cuda or (step + 1) % self.run.train.log_interval_steps == 0:
            self.check_last()

    def check_last(self) -> None:
        """LossNotFinite if the last step's losses are not finite; before weights are scored or saved, because on a GPU
        most steps are not looked at. What one of them has spoilt makes the losses of all later ones NaN, too.
        """
        if self._last_losses is None:
            return
        sums, counts, step = self._last_losses
        if not torch.isfinite(sums).all():
            found = dict(zip(self.assembly.objective.weights, (sums / counts.clamp(min=1)).tolist(), strict=True))
            raise LossNotFinite(
                f"rank {self.runtime.rank}, step {step}: the loss is not finite ({found}); last good checkpoint: "
                f"{self._last_good()}. Lower DENSE_LR or SPARSE_LR, or look for extreme numerical features in this "
                "batch"
            )


@dataclasses.dataclass(frozen=True)
class PipelinedStep:
    """`TrainingStep` cut where TorchRec's pipeline calls it: `distributed.pipeline.StepHooks`."""

    training_step: TrainingStep
    number: typing.Callable[[], int]
    """Of the step that is about to be done."""
    lr_factor: typing.Callable[[], float]
    recorder: Recorder

    def zero_grad(self) -> None:
        """See StepHooks."""
        self.training_step.begin(self.number(), self.lr_factor(), self.recorder)

    def looking_up(self) -> typing.ContextManager[typing.Any]:
        """See StepHooks."""
        return self.training_step.profiler.range(profiling.LOOKUP)

    def forward(
        self, rows: dict[str, torch.Tensor], parts: tuple[Batch, ...]
    ) -> tuple[torch.Tensor, tuple[tuple[Batch, ...], torch.Tensor, torch.Tensor]]:
        """See StepHooks; the result is (parts, loss sums [L] of this rank, counts [L] over all)."""
        loss, (sums, counts) = self.training_step.joined_loss(rows, parts, self.number())
        return loss, (parts, sums, counts)

    def step(self) -> None:
        """See StepHooks."""
        self.training_step.update(self.recorder)


def join_rows(
    rows: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same rows, whose backward adds what `leaves` have got before; and a zero that must be added to the loss.

    Through the zero a table is reached (with gradients of zero) even if no loss reaches it: all ranks must exchange.
    """
    trained = [name for name, value in rows.items() if value.requires_grad]
    if not trained:
        return rows, next(iter(rows.values())).new_zeros(())
    anchor, *values = _JoinedRows.apply([leaves[name] for name in trained], *(rows[name] for name in trained))
    return rows | dict(zip(trained, values, strict=True)), anchor


class _JoinedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaves, *rows):
        ctx.leaves = leaves
        return rows[0].new_zeros(()), *(value.view_as(value) for value in rows)

    @staticmethod
    def backward(ctx, _, *gradients):
        pairs = zip(gradients, ctx.leaves, strict=True)
        return None, *(gradient if leaf.grad is None else leaf.grad + gradient for gradient, leaf in pairs)
