"""Says what a stage is: which model it trains, what it minimises, and how it is judged. One file per stage.

The objective of a stage is the sum over its L losses of weight x (sum over all ranks / count over all ranks). So a
result does not depend on how rows fell on ranks: a loss returns its sum, the stage counts, the training step divides.

Shape letters: L losses of a stage, U distinct rows of a table in a batch, E embedding width.
"""

import dataclasses
import typing

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import RunConfig
from gpsd_dist.data.loaders import evaluation_loader
from gpsd_dist.distributed.matmul_dtype import autocast
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.parameter_names import DENSE, IDS, TABLE
from gpsd_dist.schema import Manifest, Table
from gpsd_dist.tables.id_remapping import IdRemapper
from gpsd_dist.tables.sharding import ShardedTables
from gpsd_dist.validation import did_you_mean

Metrics = dict[str, dict[str, float | int]]  # Task -> metric -> value


class Stage(typing.Protocol):
    """One stage of training. `registry.find` names it; it is built from a run and its data set."""

    with_candidates: typing.ClassVar[bool]
    """Whether training reads candidates, context and labels; without, histories alone."""

    loss_weights: dict[str, float]  # Name -> weight of each loss, in the order of L
    scored_losses: tuple[str, ...]
    """The losses that `evaluate` reports as `log_loss` of a task: their gap to training is logged."""

    def __init__(self, run: RunConfig, manifest: Manifest):
        """Raises ValueError for options that do not fit the data set."""

    def model(self, sharded: tuple[Table, ...]) -> nn.Module:
        """Builds the dense model on torch's default device. `sharded`: tables whose embeddings are looked up.

        Full transfer copies its `backbone`. Options of the tower (ModelConfig, activation checkpointing, CUDA graphs)
        act on `backbone.tower`, if there is one: `model.gpsd.Backbone` has both.
        """

    def counts(self, batch: Batch) -> torch.Tensor:
        """Counts positions or labels per loss: float32 [L]. Needs no model, so ranks can add them up beforehand."""

    def loss_sums(self, model: nn.Module, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Runs the model on `embeddings` (table -> [U, E]) and sums each loss over the batch: float32 [L]."""

    def evaluate(
        self,
        components: "Components",
        batches: typing.Iterable[tuple[Batch, ...]],
        rank_cut: int | None,
        keep: dict[str, Predictions] | None = None,
    ) -> Metrics:
        """Computes exact metrics over all batches and ranks; the caller turns gradients off. Collective.

        `keep` gets the scored candidates of each task on rank 0, where somebody asks for them.
        """

    def default_metric(self, metrics: Metrics) -> str:
        """Names the `task/metric` (larger is better) that chooses the best checkpoint, if no option names one."""


@dataclasses.dataclass(frozen=True)
class Components:
    """Holds everything of a run that has weights, built and ready to be loaded into: `assembly.assemble`."""

    tables: ShardedTables
    model: nn.Module  # The stage's dense model, on the device
    stage: Stage
    lookup_names: tuple[str, ...]  # Tables that a batch looks up
    ids: IdRemapper  # Gives a batch rows for the ids of managed tables; every batch goes through it before its lookup
    runtime: Runtime

    @property
    def forward_is_collective(self) -> bool:
        """Says whether ranks must call `model` together, to gather its weights (FSDP2); else only `tables`."""
        return isinstance(self.model, FSDPModule)

    def weights(self) -> dict[str, dict]:
        """Returns live tensors under the names that checkpoints use: `parameter_names`."""
        ids = self.ids.state()
        named = {TABLE: self.tables.weights(), DENSE: dict(self.model.state_dict())}
        return named | ({IDS: ids} if ids else {})


def check_best_metric(run: RunConfig, known: list[str]) -> None:
    """Raises ValueError if TrainConfig.best_metric is none of the `task/metric` that validations of the stage give."""
    # Found here and not by the first validation, which may come after hours of training.
    name = run.train.best_metric
    if name and name not in known:
        raise ValueError(f"TrainConfig.best_metric {name!r} is not one of {known}{did_you_mean(name, known)}")


def evaluate_split(
    run: RunConfig,
    manifest: Manifest,
    components: Components,
    split: str,
    rank_cut: int | None = None,
    keep: dict[str, Predictions] | None = None,
) -> Metrics:
    """Makes one pass over a split without training: exact metrics over all rows, the same on every rank. Collective.

    `keep` gets the scored candidates of each task on rank 0. ValueError if `rank_cut` is given to a stage that ranks no
    items, `keep` to one that scores no candidates, or the data set has no labels.
    """
    runtime = components.runtime
    # Afterwards the model is as it was: dropout on, if training goes on.
    was_training = components.model.training
    components.model.eval()
    batches = evaluation_loader(run, manifest, components.lookup_names, split, runtime)
    with torch.no_grad(), autocast(run, runtime.device):
        metrics = components.stage.evaluate(components, batches, rank_cut, *([] if keep is None else [keep]))
    components.model.train(was_training)
    return metrics
