"""One optimizer step: counts, one lookup, forward, ONE backward for dense part and tables, update.

Owns zero_grad, clip and step of both optimizers. The tables' optimizer is fused into their backward.
Shape letters: L losses of the stage, U distinct rows of a table in a batch, E embedding width.
"""

import functools
import itertools
import typing

import torch

from gpsd_dist.batch.batch import Batch
from gpsd_dist.batch.transfer import to_device
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.collectives import all_sum
from gpsd_dist.distributed.dense_parallel import clip_gradients, exchange_gradients, parallelize
from gpsd_dist.distributed.exit_codes import LossNotFinite
from gpsd_dist.distributed.matmul_dtype import autocast
from gpsd_dist.distributed.runtime import seed_step
from gpsd_dist.metrics import profiling
from gpsd_dist.metrics.training_metrics import StepResult, divisor
from gpsd_dist.optim import WeightAverage, dense_optimizer
from gpsd_dist.stages.stage import Components
from gpsd_dist.tables.new_rows import only_new_rows
from gpsd_dist.tables.prefetch import SparseDistPipeline

Parts: typing.TypeAlias = tuple[Batch, ...]
Embeddings: typing.TypeAlias = dict[str, torch.Tensor]  # Table -> [U, E]


class TrainingStep:
    """Trains step after step; the trainer decides how many. Prefetching changes when data travel, but no number."""

    def __init__(
        self,
        run: RunConfig,
        components: Components,
        profiler: profiling.StepProfiler,
        lr_factor: typing.Callable[[int], float],
        last_good: typing.Callable[[], Location | None],
    ):
        """Puts the model into training mode. Collective.

        `lr_factor`: step from 0 -> what the peak learning rates are multiplied by. `last_good`: the newest checkpoint,
        for an error message.
        """
        self.run, self.runtime, self.components, self.profiler = run, components.runtime, components, profiler
        if run.train.bf16 and self.runtime.device.type == "cuda":
            # The losses' products stay in float32, outside autocast: TF32 puts them on tensor cores with 10 bits, where
            # bf16 would leave 7.
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        self.model = components.model.train()
        # The optimizer comes after `parallelize`: FSDP2 replaces the parameters by shards of them.
        self.parallel = parallelize(self.model, run, self.runtime)
        self.optimizer = dense_optimizer(self.model, run.dense)
        self._parameters = list(self.model.parameters())
        self.average = WeightAverage(self.model, run.train.average_fraction)
        self.number = 0  # Number of the step under way, from 0 over the whole run
        # Made once, because each copy of host values to a GPU makes the host wait.
        self._loss_weights_L = torch.tensor(list(components.stage.loss_weights.values()), device=self.runtime.device)
        self._lr_factor, self._last_good = lr_factor, last_good
        self._done: StepResult | None = None  # Result of the step under way, or of the last one
        self._prefetch = None
        if run.execution.pipeline == "sparse_dist":
            looking_up = functools.partial(profiler.range, profiling.LOOKUP)
            self._prefetch = SparseDistPipeline(components.tables, self, looking_up, self.runtime.device)

    def run_steps(
        self, batches: typing.Iterator[Parts], first_step: int, num_steps: int
    ) -> typing.Iterator[StepResult]:
        """Trains on the next `num_steps` batches, and hands out a result after each step. Collective.

        With prefetching no batch is under way any more when the last item is handed out, so the tables are free.
        LossNotFinite if a loss is not finite: no weight has moved in that step.
        """
        source = itertools.islice(batches, num_steps)
        # TorchRec's pipeline makes the calls of the plain loop below in the same order, but exchanges the indices of
        # the next batch between ranks while this one computes.
        if self._prefetch is not None:
            results = self._prefetch.steps(source)
            for self.number in range(first_step, first_step + num_steps):
                with self.profiler.range(profiling.STEP):
                    done = next(results)
                yield done
            return
        for self.number, parts in enumerate(source, first_step):
            with self.profiler.range(profiling.STEP):
                self.zero_grad()
                parts = to_device(parts, self.runtime.device)
                if parts[0].raw_ids:
                    # Managed ids get their rows here, because which id owns a row is known in its own step only: this
                    # very batch may admit and evict some.
                    parts = self.components.ids.train(parts)
                # All parts share one lookup, so the tables are exchanged once per step and not once per part.
                with self.profiler.range(profiling.LOOKUP):
                    embeddings = self.components.tables(parts[0].lookup)
                loss, done = self.forward(embeddings, parts)
                # This one backward gives the dense gradients, exchanges those of the tables and updates their rows:
                # the tables' optimizer is fused into it, so a gradient of a whole table never exists.
                with self.profiler.range(profiling.BACKWARD):
                    loss.backward()
                self.step()
                done.id_facts = self.components.ids.metrics
            yield done

    def zero_grad(self) -> None:
        """Begins a step: seed, learning rates of its place in the schedule, empty gradients."""
        # Dropout is a function of (seed, step, rank), so a checkpoint needs no generator state.
        seed_step(self.run.seed, self.number, self.runtime.rank)
        factor = self._lr_factor(self.number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.dense.peak_lr * factor
        self.components.tables.set_learning_rate(self.run.sparse.peak_lr * factor)
        self.optimizer.zero_grad()

    def forward(self, embeddings: Embeddings, parts: Parts) -> tuple[torch.Tensor, StepResult]:
        """Returns the loss of the last part, joined to the tables, and what the step leaves behind. Collective.

        Parts before the last one are done here, backward included: their gradients of embeddings wait in detached
        leaves. The backward of the returned scalar adds the last part's and hands the sum to the tables.
        """
        # Counts need no model, so the global denominator is known before any backward. A mean per rank would weigh a
        # rank with few labels as much as one with many.
        with self.profiler.range(profiling.COLLECTIVES):
            counts_L = all_sum(sum(self.components.stage.counts(batch) for batch in parts))
        # DDP and TorchRec both average gradients over ranks, so times world size gives the sum over the global count. A
        # count of zero has a loss sum of zero: clamped, it gives no gradient and no NaN.
        scale_L = self._loss_weights_L * self.runtime.world_size / divisor(counts_L)
        learning_rate = self.run.dense.peak_lr * self._lr_factor(self.number)
        self._done = done = StepResult(parts, self.number, torch.zeros_like(counts_L), counts_L, learning_rate)
        if self.run.tables.frozen_rows:
            embeddings = only_new_rows(embeddings, parts[0].lookup, self.run.tables.frozen_rows)
        # Parts before the last must not run the tables' backward, or their rows would be updated once per part.
        leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in embeddings.items()}
        used, anchor = leaves, None
        for number, batch in enumerate(parts, 1):
            if number == len(parts):
                # The last part reaches the tables themselves, and takes along what waits in the leaves.
                used, anchor = join_embeddings(embeddings, leaves)
            # Gradients of the parts add up locally, so exchanging them before the last part would be traffic for
            # nothing.
            exchange_gradients(self.parallel, number == len(parts))
            if self.run.execution.cuda_graphs:
                # Outputs of a replayed graph live in its own memory; from here on the next replay may overwrite them.
                torch.compiler.cudagraph_mark_step_begin()
            # bf16 is for products of the dense model alone: weights, gradients, optimizer state and losses stay
            # float32.
            with autocast(self.run, self.runtime.device), self.profiler.range(profiling.FORWARD):
                sums_L = self.components.stage.loss_sums(self.parallel, used, batch)
            done.loss_sums_L += sums_L.detach()
            if anchor is None:
                with self.profiler.range(profiling.BACKWARD):
                    (sums_L * scale_L).sum().backward()
        self._check_finite(done)
        return (sums_L * scale_L).sum() + anchor, done

    def step(self) -> None:
        """Ends a step: clips the gradients of the dense part, updates it, and adds it to its mean."""
        with self.profiler.range(profiling.OPTIMIZER):
            # The dense part alone: the rows of the tables were updated in the backward, where no norm is known yet.
            if self.run.train.clip_norm:
                assert self._done is not None
                self._done.gradient_norm = clip_gradients(self._parameters, self.run.train.clip_norm)
            self.optimizer.step()
            self.average.update(self.number)

    def _check_finite(self, done: StepResult) -> None:
        """Looks at the losses before weights move; on a GPU only in steps that log."""
        # A GPU would have to finish the forward before the host may go on. Steps that log wait for it anyway.
        if not done.loss_sums_L.is_cuda or (self.number + 1) % self.run.train.log_interval_steps == 0:
            self.check_last()

    def check_last(self) -> None:
        """Raises LossNotFinite if the last step's losses are not finite: call it before weights are scored or saved.

        On a GPU most steps are not looked at, but what one has spoilt makes the losses of all later ones NaN.
        """
        done = self._done
        if done is not None and not torch.isfinite(done.loss_sums_L).all():
            means = (done.loss_sums_L / divisor(done.counts_L)).tolist()
            found = dict(zip(self.components.stage.loss_weights, means, strict=True))
            raise LossNotFinite(
                f"rank {self.runtime.rank}, step {done.number}: the loss is not finite ({found}); last good "
                f"checkpoint: {self._last_good()}. Lower DENSE_LR or SPARSE_LR, or look for extreme numerical "
                "features in this batch"
            )


def join_embeddings(embeddings: Embeddings, leaves: Embeddings) -> tuple[Embeddings, torch.Tensor]:
    """Joins embeddings to the gradients that their detached `leaves` hold already, for one backward into the tables.

    Returns (embeddings, anchor). Their backward hands the sum of both gradients to the tables. `anchor` is a zero to be
    added to the loss.
    """
    # Through the anchor every trained table is reached (with gradients of zero), also where no loss of this rank does
    # so, as with an empty batch. Its backward is collective: a rank that left it out would keep the others waiting.
    trained = [name for name, value in embeddings.items() if value.requires_grad]
    if not trained:
        return embeddings, next(iter(embeddings.values())).new_zeros(())
    anchor, *values = _Joined.apply([leaves[name] for name in trained], *(embeddings[name] for name in trained))
    return embeddings | dict(zip(trained, values, strict=True)), anchor


class _Joined(torch.autograd.Function):
    """Passes embeddings on; its backward adds the gradients of earlier parts to that of the last one."""

    @staticmethod
    def forward(ctx, leaves, *embeddings):
        ctx.leaves = leaves
        return embeddings[0].new_zeros(()), *(value.view_as(value) for value in embeddings)

    @staticmethod
    def backward(ctx, _, *gradients):
        pairs = zip(gradients, ctx.leaves, strict=True)
        return None, *(gradient if leaf.grad is None else leaf.grad + gradient for gradient, leaf in pairs)
