"""Says in one line what freezing the tables saves, for the log of a run and for its plan."""

from gpsd_dist.config import RunConfig
from gpsd_dist.plan.all_to_all import unsent_gradients
from gpsd_dist.plan.workload import data_shape, training_requests, workload
from gpsd_dist.schema import Manifest
from gpsd_dist.tables.sharding import Cluster, Shard

_MIB = 2**20


def expected_rows(run: RunConfig, manifest: Manifest, tables: tuple[str, ...], world_size: int) -> dict[str, float]:
    """Estimates U for each table, the distinct rows that a rank looks up in a step; reads some rows and counts."""
    shape = data_shape(run, manifest, run.training_split)
    return workload(run, manifest, tables, shape, training_requests(run, shape, world_size)).unique_rows


def frozen_line(
    run: RunConfig, manifest: Manifest, shards: tuple[Shard, ...], unique_rows: dict[str, float], cluster: Cluster
) -> str:
    """Adds up what all frozen tables save: optimizer state once, gradients in every step. Empty if none is frozen.

    `unique_rows` maps a table to U. Gradients that are not sent are a mean over ranks. The rows themselves are sent to
    the ranks that look them up, frozen or not.
    """
    config, frozen = run.tables, sorted({shard.table for shard in shards if shard.is_frozen})
    if not frozen:
        return ""
    rows = sum(manifest.table(table).num_rows for table in frozen)
    state, whole = rows * 4 / _MIB, rows * config.stored_dim * 4 / _MIB
    kept = rows * config.stored_dim * config.frozen_value_bytes / _MIB
    stored = f"; kept as {config.frozen_dtype} in {kept:.1f} instead of {whole:.1f} MiB" if kept < whole else ""
    looked_up = sum(unique_rows[table] for table in frozen)
    unsent = unsent_gradients(shards, unique_rows, cluster, run.execution).total.mean()
    return (
        f"frozen: {rows:,} rows without optimizer state ({state:.1f} MiB of row-wise Adagrad, "
        f"{2 * state * config.embedding_dim:.1f} MiB of Adam saved); per step of a rank, the gradients of "
        f"{looked_up:,.0f} rows (expected; {looked_up * config.stored_dim * 4 / _MIB:.4g} MiB) are not computed, and "
        f"{unsent / _MIB:.4g} MiB of them ({run.execution.exchange_backward}) not sent to other ranks{stored}"
    )
