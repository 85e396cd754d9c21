"""Estimates the bytes that every rank sends in a training step: rows by all-to-all, dense gradients by all-reduce.

Let rank o hold a piece of a table: a part f of the rows, c columns. Every rank sends o the indices of U f rows and the
length of each bag (8 bytes each; see `bags_per_table`). Rank o answers with U f c values, which are float32 unless
`ExecutionConfig.exchange_*` says otherwise. If the table is trained, as many values return to o as gradients.

U is the number of distinct rows that a rank looks up. The estimate assumes the same U for every rank, spread evenly
over the table. It does not count what a rank sends to itself.
"""

import collections
import dataclasses

import numpy as np

from gpsd_dist.batch.lookup import bags_per_table
from gpsd_dist.config.execution import DEFAULT, ExecutionConfig
from gpsd_dist.tables.sharding import Cluster, Shard

INDEX_BYTES, VALUE_BYTES = 8, 4  # int64 indices and lengths; float32 rows
_SENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Holds the bytes that each rank sends: float64 [world_size], by where they go."""

    intra: np.ndarray  # to ranks of the same machine
    inter: np.ndarray  # to other machines

    @property
    def total(self) -> np.ndarray:
        return self.intra + self.inter

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.intra + other.intra, self.inter + other.inter)


@dataclasses.dataclass(frozen=True)
class StepTraffic:
    """Splits the traffic of one training step by what is sent."""

    indices: Traffic  # forward all-to-all, to the owners of the rows
    rows: Traffic  # forward all-to-all, from the owners
    gradients: Traffic  # backward all-to-all, to the owners; 0 for frozen tables
    dense: Traffic  # ring all-reduce of the dense gradients; FSDP2 also gathers weights

    @property
    def total(self) -> Traffic:
        return self.indices + self.rows + self.gradients + self.dense


def step_traffic(
    shards: tuple[Shard, ...],
    unique_rows: dict[str, float],
    dense_parameters: int,
    cluster: Cluster,
    execution: ExecutionConfig = DEFAULT,
    micro_batches: int = 1,
    *,
    is_half: bool = False,
) -> StepTraffic:
    """Estimates the traffic of a step; `unique_rows` maps a table to U. `is_half`: the dense part has bf16 autocast."""
    row_bytes, gradient_bytes = (_SENT_BYTES[t] for t in (execution.exchange_forward, execution.exchange_backward))
    indices, rows, gradients = (np.zeros(cluster.world_size) for _ in range(3))
    num_bags = bags_per_table(cluster.device_type, cluster.world_size)
    for shard, count in zip(shards, held_rows(shards, unique_rows), strict=True):
        indices[shard.rank] += (count + num_bags) * INDEX_BYTES
        rows[shard.rank] += count * shard.columns * row_bytes
        gradients[shard.rank] += 0 if shard.is_frozen else count * shard.columns * gradient_bytes
    # DDP: an all-reduce is two passes of a ring. FSDP2: every forward and every backward gathers the weights of the
    # blocks, in half precision with autocast, and the float32 gradients are scattered once. Weights outside of blocks
    # are gathered less often; that is not counted here.
    gathered = micro_batches if is_half else 2 * micro_batches
    passes = gathered + 1 if execution.dense_parallel == "fsdp2" else 2
    return StepTraffic(
        indices=_to_owners(indices, cluster),
        rows=_from_owners(rows, cluster),
        gradients=_to_owners(gradients, cluster),
        dense=_ring(dense_parameters * VALUE_BYTES, cluster, passes),
    )


def unsent_gradients(
    shards: tuple[Shard, ...], unique_rows: dict[str, float], cluster: Cluster, execution: ExecutionConfig = DEFAULT
) -> Traffic:
    """Estimates the gradients that freezing saves: what the frozen `shards` would send if they were trained."""
    trained = tuple(dataclasses.replace(shard, is_frozen=False) for shard in shards if shard.is_frozen)
    return step_traffic(trained, unique_rows, 0, cluster, execution).gradients


def held_rows(shards: tuple[Shard, ...], unique_rows: dict[str, float]) -> list[float]:
    """Counts, for each piece, how many of the U rows that a rank looks up lie in it: U times its share of the rows."""
    table_rows: dict[str, int] = collections.Counter()
    for shard in shards:  # every piece of a column_wise table has all rows of it
        is_part = shard.sharding == "row_wise"
        table_rows[shard.table] = table_rows[shard.table] + shard.rows if is_part else shard.rows
    return [unique_rows[shard.table] * shard.rows / max(table_rows[shard.table], 1) for shard in shards]


def _to_owners(owned: np.ndarray, cluster: Cluster) -> Traffic:
    """Every rank sends `owned[o]` bytes to each rank o."""
    machine = np.arange(cluster.world_size) // cluster.local_world_size
    on_machine = np.bincount(machine, weights=owned)[machine]
    return Traffic(on_machine - owned, owned.sum() - on_machine)


def _from_owners(owned: np.ndarray, cluster: Cluster) -> Traffic:
    """Every rank o sends `owned[o]` bytes to each rank."""
    machine = np.arange(cluster.world_size) // cluster.local_world_size
    neighbours = np.bincount(machine)[machine]
    return Traffic(owned * (neighbours - 1), owned * (cluster.world_size - neighbours))


def _ring(size_bytes: int, cluster: Cluster, passes: int) -> Traffic:
    """Each rank sends (W - 1) / W of the buffer per pass to the next rank, which may be on the next machine."""
    world_size = cluster.world_size
    sent = np.full(world_size, passes * (world_size - 1) / world_size * size_bytes)
    rank = np.arange(world_size)
    crosses = rank // cluster.local_world_size != (rank + 1) % world_size // cluster.local_world_size
    return Traffic(np.where(crosses, 0.0, sent), np.where(crosses, sent, 0.0))
