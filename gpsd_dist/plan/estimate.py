"""Estimates table layout, memory, traffic and FLOPs of a run on a cluster. Allocates nothing, needs no group."""

import dataclasses

import torch
from torch import nn

from gpsd_dist.assembly import looked_up_tables, meta_model
from gpsd_dist.config import RunConfig
from gpsd_dist.metrics.flops import Work, step_flops
from gpsd_dist.model.gpsd import NextItemModel, RankingModel
from gpsd_dist.plan.all_to_all import StepTraffic, step_traffic
from gpsd_dist.plan.frozen import frozen_line
from gpsd_dist.plan.measured import tower_bytes
from gpsd_dist.plan.memory import Memory, ModelSize, memory, transformer_bytes
from gpsd_dist.plan.workload import DataShape, Workload, training_requests, workload
from gpsd_dist.schema import Manifest
from gpsd_dist.tables.collections import Tables
from gpsd_dist.tables.managed_collision import map_bytes
from gpsd_dist.tables.sharding import Cluster, Shard, plan_tables, shards_of, table_names

RESERVE = 0.15  # kept free for CUDA context, NCCL, fragmentation; TorchRec's planner does the same
_UNLIMITED_BYTES = 1 << 60


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Names a run, its data and the cluster that it is planned for."""

    run: RunConfig
    manifest: Manifest
    shape: DataShape
    cluster: Cluster


@dataclasses.dataclass(frozen=True)
class Layout:
    """Says which rank holds which piece of which table."""

    shards: tuple[Shard, ...]
    refusal: str  # the error of TorchRec's planner; empty if it accepts the tables


@dataclasses.dataclass(frozen=True)
class Flops:
    """Counts FLOPs of one rank, forward and backward; a multiply and an add are two."""

    step: float
    token: float  # per history token of the step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Holds what `estimate` found."""

    layout: Layout
    training: Workload
    size: ModelSize
    memory: Memory
    traffic: StepTraffic
    flops: Flops | None  # None: there is no formula for this tower or stage
    saved: str  # what freezing saves, in one line; empty if nothing is frozen
    usable_bytes: float  # memory of a rank without the reserve

    @property
    def fits(self) -> bool:
        """Whether every rank stays below its usable memory and TorchRec's planner accepts the tables."""
        return not self.layout.refusal and float(self.memory.peak.max()) <= self.usable_bytes


def estimate(scenario: Scenario, layout: Layout | None = None) -> Estimate:
    """Plans the tables and adds up memory, traffic and FLOPs. ValueError where training would refuse the run, too.

    Pass `layout` where a scenario with the same tables and ranks was planned before: hundreds of ranks take seconds.
    """
    run, manifest, cluster = scenario.run, scenario.manifest, scenario.cluster
    assert cluster.memory_bytes is not None
    sharded = looked_up_tables(run, manifest)
    layout = layout or plan_layout(scenario)
    names = tuple(table.name for table in sharded)
    requests = training_requests(run, scenario.shape, cluster.world_size)
    training = workload(run, manifest, names, scenario.shape, requests)
    validation = None
    if not run.refit_of and manifest.split("valid").num_rows:
        validation = workload(run, manifest, names, scenario.shape, run.data.eval_batch_rows_per_rank)
    size, tower = model_size(run, manifest), None
    if run.stage in ("pretrain", "finetune"):
        seen = training.without_last() if run.stage == "pretrain" else training
        if run.model.name == "transformer":
            tower = transformer_bytes(run, seen, cluster.device_type)
        else:
            tower = tower_bytes(run, manifest, seen, cluster.device_type)
    return Estimate(
        layout=layout,
        training=training,
        size=size,
        memory=memory(run, layout.shards, size, cluster, training, validation, tower),
        traffic=step_traffic(
            layout.shards,
            training.unique_rows,
            size.parameters,
            cluster,
            run.execution,
            run.train.micro_batches,
            is_half=run.train.bf16,
        ),
        flops=training_flops(run, size, training),
        saved=frozen_line(run, manifest, layout.shards, training.unique_rows, cluster),
        usable_bytes=(1 - RESERVE) * cluster.memory_bytes,
    )


def plan_layout(scenario: Scenario) -> Layout:
    """Plans the tables like training does; if they do not fit into memory, plans again without that limit."""
    run, manifest, cluster = scenario.run, scenario.manifest, scenario.cluster
    refusal, sharded, meta = "", looked_up_tables(run, manifest), torch.device("meta")
    tables = Tables(sharded, run.frozen_tables, run.tables, meta)
    names = table_names(tables)
    try:
        plan = plan_tables(tables, run.tables, run.sparse, cluster)
    except ValueError as error:
        refusal = str(error)
        tables = Tables(sharded, run.frozen_tables, run.tables, meta)
        unlimited = dataclasses.replace(cluster, memory_bytes=_UNLIMITED_BYTES)
        plan = plan_tables(tables, run.tables, run.sparse, unlimited)
    return Layout(shards_of(plan, names, run.tables.frozen_value_bytes), refusal)


def model_size(run: RunConfig, manifest: Manifest) -> ModelSize:
    """Counts parameters on the model itself, built on the meta device."""
    sharded = looked_up_tables(run, manifest)
    model = meta_model(run, manifest, sharded)
    matrices = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    auxiliary = model.auxiliary_table.values() if isinstance(model, NextItemModel) else ()
    item_table = manifest.feature(manifest.item_feature).table
    assert item_table is not None
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matrix_parameters=sum(weight.numel() for weight in matrices),
        item_table=item_table,
        item_rows=manifest.table(item_table).num_rows,
        auxiliary_rows=sum(manifest.table(table).num_rows for table in auxiliary),
        head_parameters=sum(p.numel() for p in model.heads.parameters()) if isinstance(model, RankingModel) else 0,
        head_values=_head_values(model) if isinstance(model, RankingModel) else 0,
        map_bytes=sum(
            map_bytes(table.num_rows, run.ids.eviction)
            for table in sharded
            if manifest.unbounded.get(table.name) == "managed"
        ),
    )


def _head_values(model: RankingModel) -> int:
    hidden = [layer.out_features for mlp in model.heads.mlps.values() for layer in mlp[:-1] if hasattr(layer, "weight")]
    return model.backbone.tower.out_width + model.context.width + sum(hidden)


def training_flops(run: RunConfig, size: ModelSize, step: Workload) -> Flops | None:
    """Applies `metrics.flops.step_flops` to the mean step of a rank; None where that has no formula."""
    tower = step.without_last() if run.stage == "pretrain" else step
    keys = step.candidate_keys if step.candidates else 0.0
    work = Work(tower.tokens, tower.tokens * tower.context, step.candidates, keys, step.positions)
    total = step_flops(run, work, size.head_parameters, size.auxiliary_rows)
    return None if total is None else Flops(total, total / max(step.tokens, 1e-9))
