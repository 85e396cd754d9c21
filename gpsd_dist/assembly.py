"""Builds the sharded tables and the dense model of a run, in TorchRec's order. Shared by training and evaluation."""

import dataclasses

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.dense_parallel import compile_tower
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.model.gpsd import NextItemModel, RankingModel, find_tower
from gpsd_dist.model.registry import TOWERS
from gpsd_dist.schema import Manifest, Table, Task
from gpsd_dist.stages.objective import NextItemObjective, Objective, RankingObjective, trained_tasks
from gpsd_dist.tables.collections import Tables, lookup_tables
from gpsd_dist.tables.id_assignment import IdAssignment
from gpsd_dist.tables.managed_collision import ManagedMap
from gpsd_dist.tables.row_reset import RowReset
from gpsd_dist.tables.sharding import ShardedTables, shard_tables


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
