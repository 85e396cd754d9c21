"""Builds the sharded tables and the dense model of a run, in TorchRec's order. Shared by training and evaluation."""

import torch
from torch import nn

from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.dense_parallel import compile_tower, tower_of
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.model.ops.products import use_bf16_products
from gpsd_dist.schema import Manifest, Table
from gpsd_dist.stages.registry import find
from gpsd_dist.stages.stage import Components
from gpsd_dist.tables.collections import Tables, lookup_tables
from gpsd_dist.tables.id_remapping import IdRemapper
from gpsd_dist.tables.managed_collision import ManagedCollisionMap
from gpsd_dist.tables.row_reset import RowReset
from gpsd_dist.tables.sharding import ShardedTables, shard_tables


def assemble(run: RunConfig, manifest: Manifest, runtime: Runtime) -> Components:
    """Builds everything with random weights, which are a function of the seed alone. Collective: all ranks must call.

    TorchRec wants this order: tables without memory, sharding (which allocates them), then the dense model.
    """
    sharded = looked_up_tables(run, manifest)
    # On "meta", a table of a billion rows takes no memory until the planner has said which rank holds which part.
    tables = Tables(sharded, run.frozen_tables, run.tables, torch.device("meta"))
    placed = shard_tables(tables, run.tables, run.sparse, runtime, run.seed, run.execution)
    stage = find(run.stage)(run, manifest)
    # Seeded here, whatever the tables have drawn, so that the dense weights are the same on every rank and for every
    # number of ranks. Rows of tables have seeds of their own.
    torch.manual_seed(run.seed)
    model = stage.model(sharded)
    _check_has_tower(run, model)
    if run.model.compile:
        # Compiled in place: a wrapper would change the names of parameters, which checkpoints depend on.
        compile_tower(tower_of(model), by_block=run.execution.activation_checkpointing)
    if run.execution.matmul_dtype == "bf16" and runtime.device.type == "cpu":
        use_bf16_products(model)
    names = tuple(table.name for table in sharded)
    ids = _id_remapper(run, manifest, placed, names, runtime.device)
    return Components(placed, model.to(runtime.device), stage, names, ids, runtime)


def looked_up_tables(run: RunConfig, manifest: Manifest) -> tuple[Table, ...]:
    """Lists the tables that the batches of a run look up, which are those that are sharded."""
    return lookup_tables(manifest, run.tables, with_candidates=find(run.stage).with_candidates)


def meta_model(run: RunConfig, manifest: Manifest, sharded: tuple[Table, ...]) -> nn.Module:
    """Builds the dense model of a run without memory, to count its parameters."""
    with torch.device("meta"):
        return find(run.stage)(run, manifest).model(sharded)


def _check_has_tower(run: RunConfig, model: nn.Module) -> None:
    """Raises ValueError for an option that acts on the tower if the model of the stage has none."""
    execution = run.execution
    options = {
        "ModelConfig.compile": run.model.compile,
        "ExecutionConfig.activation_checkpointing": execution.activation_checkpointing,
        "ExecutionConfig.cuda_graphs": execution.cuda_graphs,
    }
    given = [name for name, is_on in options.items() if is_on]
    if given and tower_of(model) is None:
        raise ValueError(f"{', '.join(given)}: the model of stage {run.stage!r} has no backbone.tower; leave them out")


def _id_remapper(
    run: RunConfig, manifest: Manifest, placed: ShardedTables, names: tuple[str, ...], device: torch.device
) -> IdRemapper:
    managed = [name for name in names if manifest.unbounded.get(name) == "managed"]
    maps = {name: ManagedCollisionMap(manifest.table(name).num_rows, run.ids, device) for name in managed}
    # A frozen table gets no RowReset, and its map then never changes. If a row passed to another id, that id would read
    # the embedding of the previous one, which no training could correct.
    resets = {name: RowReset(placed, name, run.tables, run.seed) for name in managed if name not in run.frozen_tables}
    return IdRemapper(manifest, maps, resets)
