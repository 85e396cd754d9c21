"""Plans and shards the tables with TorchRec. No other module knows how a table is laid out over ranks."""

import dataclasses
import itertools
import logging
import math
import typing

import numpy as np
import torch
import torch.distributed as dist
import torchrec
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.constants import MIN_CW_DIM
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingPlan

from gpsd_dist.config import CUDA_ONLY_SPARSE_OPTIMIZERS, OptimizerConfig, TablesConfig
from gpsd_dist.config.execution import DEFAULT, ExecutionConfig
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.tables.all_to_all_codec import all_to_all_codecs
from gpsd_dist.tables.collections import Tables

log = logging.getLogger(__name__)
_INIT_BLOCK_ROWS = 4096
_ROW_MEAN_OPTIMIZERS = ("rowwise_adagrad", "partial_rowwise_adam")  # one second moment per row: a mean over its columns
_OPTIMIZERS = {
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "partial_rowwise_adam": torchrec.optim.PartialRowWiseAdam,
    "lamb": torchrec.optim.LAMB,
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Describes the machines to TorchRec's planner."""

    world_size: int
    local_world_size: int  # Ranks per machine
    device_type: str  # cuda | cpu
    memory_bytes: int | None = None
    """HBM of a rank, or host memory on CPU; None takes TorchRec's assumption (32 GiB HBM, 128 GiB host)."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Describes the piece of a table that one rank holds."""

    table: str
    is_frozen: bool
    sharding: str
    rank: int
    rows: int
    columns: int
    value_bytes: int = 4  # Bytes per value in memory: 4, or 2 for a frozen fp16 table


@dataclasses.dataclass(frozen=True)
class ShardedTables:
    """Holds the tables spread over the ranks; call it like `Tables`."""

    module: DistributedModelParallel
    plan: str  # The plan as text: one line per table
    shards: tuple[Shard, ...]  # The plan as data: one Shard per table and rank
    names: dict[str, str]  # Module key -> table name
    width: int  # Embedding width E. If it is no multiple of 4, `weights()` has further columns, which stay zero.
    lr_factor: float  # Compensates in the learning rate for the padding columns; see `_lr_factor`

    def __call__(self, sparse_features):
        """Looks up the embeddings [U, E] of every table. Collective: all ranks must call."""
        return self.module(sparse_features)

    def weights(self) -> dict[str, ShardedTensor]:
        """Returns table name -> weight [rows, stored_dim] of both collections. The shards alias the live weights."""
        return {self.names[key.split(".")[-2]]: value for key, value in self.module.state_dict().items()}

    def optimizer_state(self) -> dict[str, dict[str, ShardedTensor]]:
        """Returns table name -> state name -> live value, for the trainable tables that have a shard on this rank."""
        state = self.module.fused_optimizer.state_dict()["state"]
        return {
            self.names[key.split(".")[-2]]: {name.split(".")[-1]: value for name, value in entry.items()}
            for key, entry in state.items()
            if entry
        }

    def set_learning_rate(self, lr: float) -> None:
        """Sets the learning rate of the next backward; a fused table reads it from its group in `zero_grad` only."""
        for group in self.module.fused_optimizer.param_groups:
            group["lr"] = lr * self.lr_factor
        self.module.fused_optimizer.zero_grad()


def shard_tables(
    tables: Tables,
    config: TablesConfig,
    optimizer: OptimizerConfig,
    runtime: Runtime,
    seed: int,
    execution: ExecutionConfig = DEFAULT,
) -> ShardedTables:
    """Plans, shards and initialises tables that were built on `meta`. Collective. Consumes `tables`.

    ValueError if the optimizer has no kernel on this device, or the tables do not fit into memory.
    """
    if runtime.device.type != "cuda" and optimizer.name in CUDA_ONLY_SPARSE_OPTIMIZERS:
        raise ValueError(f"sparse optimizer {optimizer.name!r} has no CPU kernel in FBGEMM; use 'rowwise_adagrad'")
    halved = {execution.exchange_forward, execution.exchange_backward} - {"fp32"}
    if halved and runtime.world_size == 1:
        log.warning("exchange in %s has no effect on one rank: nothing is exchanged", "/".join(sorted(halved)))
    sharder = _sharder(execution)
    planner = _planner(tables, config, optimizer, _cluster(runtime))
    try:
        plan = planner.collective_plan(tables, [sharder], dist.group.WORLD)
    except PlannerError as error:
        raise ValueError(
            f"the tables do not fit into the memory of {runtime.world_size} ranks; `python -m gpsd_dist.plan` with the "
            f"same options says what would help. TorchRec says: {error}"
        ) from error
    names = table_names(tables)
    module = DistributedModelParallel(
        module=tables, device=runtime.device, plan=plan, sharders=[sharder], init_data_parallel=False
    )
    factor = _lr_factor(config, optimizer)
    shards = shards_of(plan, names, config.frozen_value_bytes)
    sharded = ShardedTables(module, readable(shards, config), shards, names, config.embedding_dim, factor)
    for name, weight in sharded.weights().items():
        _initialise(weight, name, config, seed)
    return sharded


def plan_tables(tables: Tables, config: TablesConfig, optimizer: OptimizerConfig, cluster: Cluster) -> ShardingPlan:
    """Returns the plan of `shard_tables` on a cluster, without its devices and without a process group.

    Consumes `tables` (on `meta`). ValueError with the planner's reason if they do not fit.
    """
    planner = _planner(tables, config, optimizer, cluster)
    try:
        return planner.plan(tables, [_sharder(DEFAULT)])
    except PlannerError as error:
        raise ValueError(str(error)) from error


def table_names(tables: Tables) -> dict[str, str]:
    """Returns module key -> table name."""
    collections = [collection for collection in (tables.trainable, tables.frozen) if collection is not None]
    return {entry.name: entry.feature_names[0] for part in collections for entry in part.embedding_configs()}


def shards_of(plan: ShardingPlan, names: dict[str, str], frozen_value_bytes: int = 4) -> tuple[Shard, ...]:
    """Turns a plan into data: one Shard per table and rank. `names`: module key -> table name."""
    return tuple(
        Shard(
            names[key],
            path.endswith("frozen"),
            parameter.sharding_type,
            shard.placement.rank(),
            shard.shard_sizes[0],
            shard.shard_sizes[1],
            frozen_value_bytes if path.endswith("frozen") else 4,
        )
        for path, parameters in plan.plan.items()
        for key, parameter in parameters.items()
        for shard in parameter.sharding_spec.shards
    )


def _planner(
    tables: Tables, config: TablesConfig, optimizer: OptimizerConfig, cluster: Cluster
) -> EmbeddingShardingPlanner:
    """Attaches the optimizer to the trainable tables (its state is part of the plan) and constrains every table."""
    if tables.trainable is not None:
        apply_optimizer_in_backward(
            _OPTIMIZERS[optimizer.name], tables.trainable.parameters(), _optimizer_arguments(optimizer)
        )
    names = table_names(tables)
    for name in names.values():
        if config.sharding.get(name) == "column_wise" and config.stored_dim < 2 * MIN_CW_DIM:
            log.warning(
                "table %s: column_wise keeps it whole on one rank: a shard has >= %d columns, EMBEDDING_DIM is %d",
                name,
                MIN_CW_DIM,
                config.embedding_dim,
            )
    # Constrain every table. A small one without constraint becomes data parallel, which our CPU path cannot train.
    constraints = {
        key: ParameterConstraints(
            sharding_types=[config.sharding.get(name, "row_wise")], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
        )
        for key, name in names.items()
    }
    on_device = {"cuda": "hbm_cap", "cpu": "ddr_cap"}[cluster.device_type]
    topology = Topology(
        world_size=cluster.world_size,
        local_world_size=cluster.local_world_size,
        compute_device=cluster.device_type,
        **({} if cluster.memory_bytes is None else {on_device: cluster.memory_bytes}),
    )
    return EmbeddingShardingPlanner(topology=topology, constraints=constraints, debug=False)


def _sharder(execution: ExecutionConfig) -> EmbeddingCollectionSharder:
    # Without this check an id outside the table silently reads row 0, or another rank's first row.
    fused_params = {"bounds_check_mode": BoundsCheckMode.FATAL}
    return EmbeddingCollectionSharder(fused_params, qcomm_codecs_registry=all_to_all_codecs(execution))


def _cluster(runtime: Runtime) -> Cluster:
    memory_bytes = None
    if runtime.device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(runtime.device).total_memory
    return Cluster(runtime.world_size, runtime.local_world_size, runtime.device.type, memory_bytes)


def _lr_factor(config: TablesConfig, optimizer: OptimizerConfig) -> float:
    """Returns sqrt(E / stored_dim) for row-wise optimizers, 1 for others.

    A row-wise second moment is a mean over the stored columns. Zero padding makes it smaller by E / stored_dim, and the
    update, which divides by its root, longer. The factor undoes that: exactly up to eps, and only on average for a
    column-wise table, whose shards have one moment each.
    """
    is_mean = optimizer.name in _ROW_MEAN_OPTIMIZERS
    return math.sqrt(config.embedding_dim / config.stored_dim) if is_mean else 1.0


def _optimizer_arguments(optimizer: OptimizerConfig) -> dict[str, typing.Any]:
    arguments: dict[str, typing.Any] = {"lr": optimizer.peak_lr}
    if optimizer.name != "sgd":
        arguments["eps"] = optimizer.eps
    if optimizer.name in ("adam", "partial_rowwise_adam", "lamb"):
        arguments["betas"] = (optimizer.beta1, optimizer.beta2)
    if optimizer.weight_decay:
        # FBGEMM ignores weight_decay without a decay mode, and its modes decay only the rows of the batch: not AdamW.
        raise ValueError(f"sparse weight_decay {optimizer.weight_decay}: not built for tables; set it to 0")
    return arguments


def readable(shards: tuple[Shard, ...], config: TablesConfig) -> str:
    """Describes each table in one line; joins neighbouring ranks that hold pieces of one size."""
    lines = []
    for (table, is_frozen, kind), pieces in itertools.groupby(shards, lambda s: (s.table, s.is_frozen, s.sharding)):
        groups: list[tuple[str, list[int]]] = []
        for piece in pieces:
            size = f"{piece.rows:,} x {piece.columns}"
            if groups and groups[-1][0] == size and piece.rank == groups[-1][1][-1] + 1:
                groups[-1][1].append(piece.rank)
            else:
                groups.append((size, [piece.rank]))
        places = (f"{size} on rank {r[0]}" if len(r) == 1 else f"{size} on ranks {r[0]}-{r[-1]}" for size, r in groups)
        lines.append(f"table {table}: {'frozen' if is_frozen else 'trainable'}, {kind}: {'; '.join(places)}")
    if config.stored_dim != config.embedding_dim:
        lines.append(f"rows are {config.embedding_dim} wide and stored as {config.stored_dim}, padded with zeros")
    return "\n".join(lines)


def _initialise(weight: ShardedTensor, table: str, config: TablesConfig, seed: int) -> None:
    """Draws weights from N(0, std) by (seed, table, block of rows): equal for any world size and plan. Padding is 0."""
    width, padding = config.embedding_dim, config.stored_dim - config.embedding_dim
    for shard in weight.local_shards():
        (first, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        for block in range(first // _INIT_BLOCK_ROWS, -(-(first + rows) // _INIT_BLOCK_ROWS)):
            entropy = (seed, block, *table.encode())
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
            values = random.standard_normal((_INIT_BLOCK_ROWS, width), dtype=np.float32) * config.init_std
            values = np.pad(values, ((0, 0), (0, padding)))
            start = block * _INIT_BLOCK_ROWS
            low, high = max(first, start), min(first + rows, start + _INIT_BLOCK_ROWS)
            piece = torch.from_numpy(values[low - start : high - start, column : column + columns])
            shard.tensor[low - first : high - first].copy_(piece)
