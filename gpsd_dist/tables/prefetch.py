"""Runs the training step in TorchRec's sparse_dist pipeline: during a step the next batch is copied to the device and
its indices are sent to the ranks that own the rows. Computation keeps the order of the plain loop, so bits are equal.

`TrainPipelineSparseDist.progress` decides when to call, `training_step.py` what happens then. Batches are read up to
two steps ahead, so a checkpoint must save the data position of the batch that was trained, not of the reader.
"""

import typing

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.streamable import Pipelineable

from gpsd_dist.batch.batch import Batch
from gpsd_dist.batch.transfer import to_device
from gpsd_dist.tables.sharding import ShardedTables

Parts: typing.TypeAlias = tuple[Batch, ...]


class StepHooks(typing.Protocol):
    """Names the parts of a step in the order of the calls; `training_step.TrainingStep` implements them."""

    def zero_grad(self) -> None:
        """Begins a step: also sets its seed and learning rates."""

    def forward(self, embeddings: dict[str, torch.Tensor], parts: Parts) -> tuple[torch.Tensor, typing.Any]:
        """Returns a loss whose backward computes dense gradients and updates the tables, and what `steps` yields."""

    def step(self) -> None:
        """Ends a step after its backward: clips gradients and updates the dense part."""


class PrefetchedParts(Pipelineable):
    """Wraps the micro-batches of one step, so that TorchRec's pipeline can move them."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.lookup = parts[0].lookup
        """Sparse features. The pipeline finds them by tracing this attribute; a property would not be prefetched."""

    def to(self, device: torch.device, non_blocking: bool = True) -> "PrefetchedParts":
        return PrefetchedParts(to_device(self.parts, device))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in self.parts:
            part.record_stream(stream)


class _Lookup(nn.Module):
    """Holds the only code that the pipeline traces: one lookup in the tables."""

    def __init__(self, tables: nn.Module):
        super().__init__()
        self.tables = tables

    def forward(self, prefetched: PrefetchedParts) -> dict[str, torch.Tensor]:
        return self.tables(prefetched.lookup)


class SparseDistPipeline:
    """Owns the tables while `steps` runs; a process has at most one."""

    def __init__(
        self,
        tables: ShardedTables,
        hooks: StepHooks,
        looking_up: typing.Callable[[], typing.ContextManager[typing.Any]],
        device: torch.device,
    ):
        """`looking_up` surrounds every lookup, for the profiler and the watchdog."""
        lookup = _Lookup(tables.module.module)

        def forward(prefetched: PrefetchedParts) -> tuple[torch.Tensor, typing.Any]:
            with looking_up():
                embeddings = lookup(prefetched)
            return hooks.forward(embeddings, prefetched.parts)

        self._lookup = lookup
        self._pipeline = TrainPipelineSparseDist(lookup, hooks, device, custom_model_fwd=forward)

    def steps(self, source: typing.Iterator[Parts]) -> typing.Iterator[typing.Any]:
        """Trains on every batch of `source` and yields once per step. Collective: equally many on every rank.

        The tables are usable outside again from the last yield on (with batches in flight, only the pipeline can look
        them up). RuntimeError if TorchRec does not prefetch a collection, which it merely logs itself.
        """
        prefetched = (PrefetchedParts(parts) for parts in source)
        is_first = True
        while True:
            try:
                result = self._pipeline.progress(prefetched)
            except StopIteration:  # `source` was empty
                return
            if is_first:
                check_prefetched(self._lookup)
            is_first = False
            is_last = not self._pipeline.batches
            if is_last:
                self._pipeline.detach()
            yield result
            if is_last:
                return


def check_prefetched(model: nn.Module) -> None:
    """Raises RuntimeError if the pipeline has not taken over the `forward` of a sharded collection."""
    sharded = {name: module for name, module in model.named_modules() if isinstance(module, ShardedModule)}
    plain = [name for name, module in sharded.items() if "forward" not in vars(module)]
    if plain or not sharded:
        raise RuntimeError(
            f"TorchRec's pipeline does not prefetch {plain or 'anything'}: does the lookup do more than read?"
        )
