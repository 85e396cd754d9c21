"""Bytes that every rank sends in a training step: table rows by all-to-all, dense gradients by all-reduce.

Per table piece that rank o holds (a part f of the rows, c columns), every rank sends o the indices of U f rows and
the length of each bag (8 bytes each; see `bags_per_table`), o answers with U f c values (float32 unless
`ExecutionConfig.exchange_*` says less), and, if the table is trained, gets as many back as gradients.
U: distinct rows that a rank looks up; every rank is assumed to need the same number, evenly over the table. What a
rank sends to itself does not count.
"""

import collections
import dataclasses

import numpy as np

from gpsd_dist.batch.batch import bags_per_table
from gpsd_dist.config.execution import DEFAULT, ExecutionConfig
from gpsd_dist.tables.sharding import Cluster, Shard

INDEX_BYTES, VALUE_BYTES = 8, 4  # int64 indices and lengths; float32 rows
_SENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends, float64 [world_size]."""

    intra: np.ndarray
    """To ranks of the same machine."""
    inter: np.ndarray
    """To other machines."""

    @property
    def total(self) -> np.ndarray:
        """[world_size]"""
        return self.intra + self.inter

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.intra + other.intra, self.inter + other.inter)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What travels in one training step, by kind."""

    indices: Traffic
    """Forward, to the owners of the rows."""
    rows: Traffic
    """Forward, from the owners."""
    gradients: Traffic
    """Backward, to the owners; nothing for frozen tables."""
    dense: Traffic
    """Dense gradients (all-reduce), with FSDP2 also weights (see `_dense`), as rings over all ranks."""

    @property
    def total(self) -> Traffic:
        """All of it."""
        return self.indices + self.rows + self.gradients + self.dense


def exchange(
    shards: tuple[Shard, ...],
    unique_rows: dict[str, float],
    dense_parameters: int,
    cluster: Cluster,
    execution: ExecutionConfig = DEFAULT,
    micro_batches: int = 1,
) -> Exchange:
    """`unique_rows`: table -> U."""
    row_bytes, gradient_bytes = (_SENT_BYTES[t] for t in (execution.exchange_forward, execution.exchange_backward))
    held = held_rows(shards, unique_rows)
    indices, rows, gradients = (np.zeros(cluster.world_size) for _ in range(3))
    num_bags = bags_per_table(cluster.device_type, cluster.world_size)
    for shard, count in zip(shards, held, strict=True):
        indices[shard.rank] += (count + num_bags) * INDEX_BYTES
        rows[shard.rank] += count * shard.columns * row_bytes
        gradients[shard.rank] += 0 if shard.is_frozen else count * shard.columns * gradient_bytes
    return Exchange(
        indices=_to_owners(indices, cluster),
        rows=_from_owners(rows, cluster),
        gradients=_to_owners(gradients, cluster),
        dense=_dense(dense_parameters * VALUE_BYTES, cluster, execution, micro_batches),
    )


def unsent_gradients(
    shards: tuple[Shard, ...],
    unique_rows: dict[str, float],
    stored_dim: int,
    cluster: Cluster,
    execution: ExecutionConfig = DEFAULT,
) -> Traffic:
    """What the frozen tables among `shards` would send back, were they trained with `stored_dim` columns."""
    trained = tuple(  # column_wise pieces have their part of the columns; others may be codes, which are fewer
        dataclasses.replace(
            shard, is_frozen=False, columns=shard.columns if shard.sharding == "column_wise" else stored_dim
        )
        for shard in shards
        if shard.is_frozen
    )
    return exchange(trained, unique_rows, 0, cluster, execution).gradients


def held_rows(shards: tuple[Shard, ...], unique_rows: dict[str, float]) -> list[float]:
    """Of each piece: how many of the U rows that one rank looks up lie in it, U times its part of the table's rows."""
    table_rows: dict[str, int] = collections.Counter()
    for shard in shards:  # pieces of a column_wise table have all of its rows each
        is_part = shard.sharding == "row_wise"
        table_rows[shard.table] = table_rows[shard.table] + shard.rows if is_part else shard.rows
    return [unique_rows[shard.table] * shard.rows / max(table_rows[shard.table], 1) for shard in shards]


def _to_owners(owned: np.ndarray, cluster: Cluster) -> Traffic:
    """Every rank sends `owned[o]` to each o."""
    machine = np.arange(cluster.world_size) // cluster.local_world_size
    on_machine = np.bincount(machine, weights=owned)[machine]
    return Traffic(on_machine - owned, owned.sum() - on_machine)


def _from_owners(owned: np.ndarray, cluster: Cluster) -> Traffic:
    """Rank o sends `owned[o]` to each rank."""
    machine = np.arange(cluster.world_size) // cluster.local_world_size
    neighbours = np.bincount(machine)[machine]
    return Traffic(owned * (neighbours - 1), owned * (cluster.world_size - neighbours))


def _dense(size_bytes: int, cluster: Cluster, execution: ExecutionConfig, micro_batches: int) -> Traffic:
    """DDP: one all-reduce, which is two passes. FSDP2: the weights of blocks are gathered in every forward and again
    in every backward, gradients scattered once; what is in no block is gathered once, which is not told apart here.
    """
    return _ring(size_bytes, cluster, 2 * micro_batches + 1 if execution.dense_parallel == "fsdp2" else 2)


def _ring(size_bytes: int, cluster: Cluster, passes: int) -> Traffic:
    """Each rank sends (W - 1) / W of the buffer per pass to its successor; the last rank of a machine to the next
    machine.
    """
    world_size = cluster.world_size
    sent = np.full(world_size, passes * (world_size - 1) / world_size * size_bytes)
    rank = np.arange(world_size)
    crosses = rank // cluster.local_world_size != (rank + 1) % world_size // cluster.local_world_size
    return Traffic(np.where(crosses, 0.0, sent), np.where(crosses, sent, 0.0))
