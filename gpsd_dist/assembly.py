"""Builds the sharded tables and the dense model of a run, in TorchRec's order. Shared by training and evaluation."""

import dataclasses
import logging

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.dense import compile_tower
from gpsd_dist.distributed.row_reset import RowReset
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.distributed.sharding import ShardedTables, shard_tables
from gpsd_dist.execution_config import BLOCK_MODELS
from gpsd_dist.ids.assignment import IdAssignment
from gpsd_dist.ids.managed import ManagedMap
from gpsd_dist.model.embeddings import Tables, lookup_tables
from gpsd_dist.model.gpsd import NextItemModel, RankingModel, find_tower
from gpsd_dist.model.registry import TOWERS
from gpsd_dist.objective import NextItemObjective, Objective, RankingObjective, trained_tasks
from gpsd_dist.schema import Manifest, Table, Task

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A model ready to be loaded into."""

    tables: ShardedTables
    model: nn.Module
    """NextItemModel or RankingModel on the device."""
    objective: Objective
    tasks: tuple[Task, ...]
    """Of a RankingModel; empty in pretraining."""
    lookup_names: tuple[str, ...]
    """Tables that a batch looks up."""

    ids: IdAssignment
    """Gives a batch rows for the ids of managed tables; every batch goes through it before its lookup."""

    @property
    def forward_is_collective(self) -> bool:
        """Whether ranks must call `model` together, because they gather its weights (FSDP2); else only `tables`."""
        return isinstance(self.model, FSDPModule)

    def weights(self) -> dict[str, dict]:
        """Live tensors under the names that checkpoints use: `table.<name>`, `dense.<parameter>`, and
        `ids.<table>.<name>` where a table is managed.
        """
        ids = self.ids.state()
        named = {"table": self.tables.weights(), "dense": dict(self.model.state_dict())}
        return named | ({"ids": ids} if ids else {})


def assemble(run: RunConfig, manifest: Manifest, runtime: Runtime) -> Assembly:
    """Random weights, a function of the seed alone. Collective: all ranks must call."""
    sharded, tables = meta_tables(run, manifest)
    placed = shard_tables(tables, run.tables, run.sparse, runtime, run.seed, run.execution)
    torch.manual_seed(run.seed)
    model, objective, tasks = dense_model(run, manifest, sharded)
    if run.model.compile:
        compile_tower(model.backbone.tower, by_block=run.execution.activation_checkpointing)
    names = tuple(table.name for table in sharded)
    ids = _id_assignment(run, manifest, placed, names, runtime.device)
    return Assembly(placed, model.to(runtime.device), objective, tasks, names, ids)


def _id_assignment(
    run: RunConfig, manifest: Manifest, placed: ShardedTables, names: tuple[str, ...], device: torch.device
) -> IdAssignment:
    managed = [name for name in names if manifest.unbounded.get(name) == "managed"]
    frozen = run.tables.transfer if run.freezes_tables else ()
    maps = {name: ManagedMap(manifest.table(name).num_rows, run.ids, device) for name in managed}
    resets = {name: RowReset(placed, name, run.tables, run.seed) for name in managed if name not in frozen}
    return IdAssignment(manifest, maps, resets)


def meta_tables(run: RunConfig, manifest: Manifest) -> tuple[tuple[Table, ...], Tables]:
    """The tables that are sharded, and their module without memory: `shard_tables` or a plan allocates nothing yet."""
    sharded = lookup_tables(manifest, run.tables, with_candidates=run.stage != "pretrain")
    frozen = run.tables.transfer if run.freezes_tables else ()
    return sharded, Tables(sharded, frozen, run.tables, torch.device("meta"))


def dense_model(
    run: RunConfig, manifest: Manifest, sharded: tuple[Table, ...]
) -> tuple[nn.Module, Objective, tuple[Task, ...]]:
    """NextItemModel or RankingModel on torch's current default device, its objective and its tasks."""
    if run.stage == "pretrain":
        next_item = NextItemModel(manifest, run.tables, run.model, sharded, run.pretrain.auxiliary)
        return next_item, NextItemObjective(run.pretrain, manifest), ()
    tasks = trained_tasks(run.finetune, manifest)
    if run.finetune.next_behaviour_weight and not find_tower(run.model.name).supervises_history:
        able = sorted(name for name, tower in TOWERS.items() if tower.supervises_history)
        raise ValueError(
            f"next_behaviour_weight {run.finetune.next_behaviour_weight}: model {run.model.name!r} has no history "
            f"states to supervise, only {able} have; leave the option out"
        )
    ranking = RankingModel(manifest, run.tables, run.model, sharded, tuple(task.name for task in tasks))
    return ranking, RankingObjective(run.finetune, tasks), tasks


def check_options_against_data(run: RunConfig, manifest: Manifest) -> None:
    """Warns of options without effect; ValueError for those that cannot be followed. Needs no process group."""
    _check_against_model(run)
    _check_against_tables(run, manifest)
    if run.data.max_history_length > manifest.max_history_length:
        log.warning(
            "max_history_length %d has no effect: the data was built with histories of at most %d",
            run.data.max_history_length,
            manifest.max_history_length,
        )
    for name in run.model.unread():
        log.warning("%s %s has no effect on model %r", name, getattr(run.model, name), run.model.name)
    if manifest.split("valid").num_rows == 0:
        if run.train.patience or run.train.best_metric:
            given = f"patience {run.train.patience} and best_metric {run.train.best_metric!r}"
            raise ValueError(f"{given} need a valid split, and that of {run.data_dir} has no rows: leave them out")
        log.warning("%s has no valid rows: nothing is validated, and the last checkpoint counts", run.data_dir)
    elif not run.refit_of:
        check_can_be_scored(run, manifest, "valid")
    if run.finetune.esmm and not any(task.given for task in manifest.tasks):
        log.warning("esmm has no effect: no task of the data set is given another one")


def check_can_be_scored(run: RunConfig, manifest: Manifest, split: str) -> None:
    """ValueError for a data set without labels."""
    if not manifest.tasks:
        raise ValueError(f"{run.data_dir} has no task, so there is nothing to score in {split!r}")


def tables_kept_whole(run: RunConfig, manifest: Manifest) -> set[str]:
    """Looked-up tables that may not be column_wise: rows of managed ones change hands in training, and their optimizer
    state, which is emptied then, is not by row if columns are on several ranks.
    """
    looked_up = {table.name for table in lookup_tables(manifest, run.tables, with_candidates=run.stage != "pretrain")}
    frozen = set(run.tables.transfer if run.freezes_tables else ())
    return {name for name, kind in manifest.unbounded.items() if kind == "managed"} & looked_up - frozen


def _check_against_model(run: RunConfig) -> None:
    if run.execution.token_multiple and run.model.name != "transformer":
        raise ValueError(f"token_multiple with model {run.model.name!r}: only the transformer runs on padded batches")
    if run.execution.activation_checkpointing and run.model.name not in BLOCK_MODELS:
        given = f"activation_checkpointing with model {run.model.name!r}"
        raise ValueError(f"{given}: it has no blocks to compute again, only {', '.join(BLOCK_MODELS)} have")


def _check_against_tables(run: RunConfig, manifest: Manifest) -> None:
    managed = sorted(name for name, kind in manifest.unbounded.items() if kind == "managed")
    if run.execution.pipeline == "sparse_dist" and managed:
        raise ValueError(
            f"pipeline 'sparse_dist' looks rows up ahead of their step, and those of the managed tables {managed} are "
            "known in it only: leave ExecutionConfig.pipeline at 'plain', or build the data with --hashed_features"
        )
    for table in sorted(tables_kept_whole(run, manifest)):
        if run.tables.sharding.get(table) == "column_wise":
            raise ValueError(f"table {table!r} has managed ids and is column_wise; make it row_wise or table_wise")
