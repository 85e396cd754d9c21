"""TorchRec's pipeline around our step: while one step computes, the next batch is copied to the device and its indices
travel to the ranks that own the rows. The order of computation, and so every number, is that of the plain loop.

TorchRec owns the order of the calls (`TrainPipelineSparseDist.progress`), `training_step.py` what they do. Batches are
taken up to two steps ahead, so whoever saves a data position must save the one of the batch that was trained.
"""

import typing

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.streamable import Pipelineable

from gpsd_dist.batch.batch import Batch, to_device
from gpsd_dist.tables.sharding import ShardedTables

Parts: typing.TypeAlias = tuple[Batch, ...]


class StepHooks(typing.Protocol):
    """The parts of a step, in the order in which the pipeline calls them: `training_step.TrainingStep`."""

    def zero_grad(self) -> None:
        """Begins a step: also sets its seed and learning rates."""

    def looking_up(self) -> typing.ContextManager[typing.Any]:
        """Surrounds the lookup."""

    def forward(self, embeddings: dict[str, torch.Tensor], parts: Parts) -> tuple[torch.Tensor, typing.Any]:
        """Returns a loss whose backward computes dense gradients and updates the tables, and what `steps` hands out."""

    def step(self) -> None:
        """Ends a step after its backward: clips, and moves the dense part."""


class PrefetchedParts(Pipelineable):
    """The parts of one step's batch, as TorchRec's pipeline wants to handle them."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.lookup = parts[0].lookup
        """The pipeline finds what to exchange by reading this attribute; anything computed would not be prefetched."""

    def to(self, device: torch.device, non_blocking: bool = True) -> "PrefetchedParts":
        return PrefetchedParts(to_device(self.parts, device))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in self.parts:
            part.record_stream(stream)


class _Lookup(nn.Module):
    """All that the pipeline traces."""

    def __init__(self, tables: nn.Module):
        super().__init__()
        self.tables = tables

    def forward(self, prefetched: PrefetchedParts) -> dict[str, torch.Tensor]:
        return self.tables(prefetched.lookup)


class SparseDistPipeline:
    """One per process; the tables belong to it while `steps` runs."""

    def __init__(self, tables: ShardedTables, hooks: StepHooks, device: torch.device):
        lookup = _Lookup(tables.module.module)

        def forward(prefetched: PrefetchedParts) -> tuple[torch.Tensor, typing.Any]:
            with hooks.looking_up():
                rows = lookup(prefetched)
            return hooks.forward(rows, prefetched.parts)

        self._lookup = lookup
        self._pipeline = TrainPipelineSparseDist(lookup, hooks, device, custom_model_fwd=forward)

    def steps(self, source: typing.Iterator[Parts]) -> typing.Iterator[typing.Any]:
        """Trains on every batch of `source`; one item per step done. Collective: as many on every rank.

        Runs until `source` is exhausted. Before the last item the tables are given back: with batches under way they
        cannot be looked up by anybody else. RuntimeError if TorchRec does not prefetch a collection (it only logs).
        """
        prefetched = (PrefetchedParts(parts) for parts in source)
        is_first = True
        while True:
            try:
                result = self._pipeline.progress(prefetched)
            except StopIteration:  # not one batch
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
    """RuntimeError if the pipeline has not taken over the `forward` of a sharded collection."""
    sharded = {name: module for name, module in model.named_modules() if isinstance(module, ShardedModule)}
    plain = [name for name, module in sharded.items() if "forward" not in vars(module)]
    if plain or not sharded:
        raise RuntimeError(
            f"TorchRec's pipeline does not prefetch {plain or 'anything'}: does the lookup do more than read?"
        )
