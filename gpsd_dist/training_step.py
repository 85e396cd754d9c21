"""One optimizer step: counts, one lookup, forward and backward, update of tables and dense part."""

import typing

import torch
from torch.nn.parallel import DistributedDataParallel

from gpsd_dist.assembly import Assembly
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import RunConfig
from gpsd_dist.data.batch import Batch
from gpsd_dist.distributed.collectives import all_sum
from gpsd_dist.distributed.runtime import Runtime, seed_step
from gpsd_dist.metrics import profiling
from gpsd_dist.metrics.recorder import Recorder
from gpsd_dist.optim.dense import dense_optimizer


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
        self.model = assembly.model.train()
        self.optimizer = dense_optimizer(self.model, run.dense)
        self.parallel = DistributedDataParallel(self.model) if runtime.world_size > 1 else self.model
        self._last_good = last_good

    def __call__(
        self, batches: tuple[Batch, ...], step: int, lr_factor: float, recorder: Recorder
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One lookup and one or more parts of a batch (gradient accumulation). Collective.

        `lr_factor` times the peak is the learning rate. Returns this rank's loss sums [L] and the counts [L] over all
        ranks. ValueError if a loss is not finite: no weight has moved then.
        """
        seed_step(self.run.seed, step, self.runtime.rank)
        self._set_learning_rates(lr_factor, recorder)
        self.optimizer.zero_grad()
        batches = tuple(batch.to(self.runtime.device) for batch in batches)
        with self.profiler.range(profiling.COLLECTIVES):
            counts = all_sum(sum(self.assembly.objective.counts(batch) for batch in batches).to(self.runtime.device))
        sums = self._backward(batches, counts, step)  # updates the tables
        with self.profiler.range(profiling.OPTIMIZER):
            if self.run.train.clip_norm:
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.train.clip_norm)
                recorder.record("train/gradient_norm", norm)
            self.optimizer.step()
        return sums, counts

    def _set_learning_rates(self, lr_factor: float, recorder: Recorder) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.dense.peak_lr * lr_factor
        self.assembly.tables.set_learning_rate(self.run.sparse.peak_lr * lr_factor)
        recorder.record("train/dense_lr", self.run.dense.peak_lr * lr_factor, reduce="last")

    def _backward(self, batches: tuple[Batch, ...], counts: torch.Tensor, step: int) -> torch.Tensor:
        """Gradients of the dense part, and the update of the tables, whose optimizer is fused into their backward.

        `counts` [L] are over all ranks. Returns this rank's loss sums [L].
        """
        objective, tables = self.assembly.objective, self.assembly.tables
        weight = torch.tensor(list(objective.weights.values()), device=counts.device)
        # DDP and TorchRec both average gradients over ranks: times world size gives the sum over the global count
        scale = weight * self.runtime.world_size / counts.clamp(min=1)
        with self.profiler.range(profiling.LOOKUP):
            rows = tables(batches[0].lookup)
        leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in rows.items()}
        sums = torch.zeros_like(counts)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            if isinstance(self.parallel, DistributedDataParallel):
                self.parallel.require_backward_grad_sync = is_last
            autocast = torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=self.run.train.bf16)
            with autocast, self.profiler.range(profiling.FORWARD):
                part = objective.sums(self.parallel, leaves, batch)
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

    def _check_finite(self, sums: torch.Tensor, counts: torch.Tensor, step: int) -> None:
        """Before weights move. ValueError names rank and step. On a GPU only at log steps, because it waits for it."""
        if sums.is_cuda and step % self.run.train.log_interval_steps:
            return
        if not torch.isfinite(sums).all():
            found = dict(zip(self.assembly.objective.weights, (sums / counts.clamp(min=1)).tolist(), strict=True))
            raise ValueError(
                f"rank {self.runtime.rank}, step {step}: the loss is not finite ({found}); last good checkpoint: "
                f"{self._last_good()}. Lower DENSE_LR or SPARSE_LR, or look for extreme numerical features in this "
                "batch"
            )
