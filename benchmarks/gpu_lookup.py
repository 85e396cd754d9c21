"""Measures lookup of table rows on one GPU against a plain copy of as many bytes."""

import statistics
import typing

import numpy as np
import torch

from benchmarks.gpu_bench import Bench
from gpsd_dist.batch.lookup import lookup_of
from gpsd_dist.config import OptimizerConfig, TablesConfig
from gpsd_dist.schema import Table
from gpsd_dist.tables.collections import Tables
from gpsd_dist.tables.sharding import shard_tables


def lookup(bench: Bench, name: str) -> dict[str, typing.Any]:
    """Times a forward of the sharded tables on distinct random rows against copying those rows in memory."""
    config, sizes = TablesConfig(embedding_dim=128), bench.sizes
    tables = Tables((Table("item", sizes.table_rows, "x"),), (), config, torch.device("meta"))
    sharded = shard_tables(tables, config, OptimizerConfig("rowwise_adagrad", 0.1), bench.runtime, seed=0)
    index = np.random.default_rng(0).permutation(sizes.table_rows)[: sizes.looked_up_rows]
    batch = lookup_of(("item",), torch.from_numpy(np.sort(index)), [len(index)]).to(bench.device)
    with torch.no_grad():
        lookup_s = bench.seconds(lambda: sharded(batch)["item"], sizes.repeats)
        rows = sharded(batch)["item"]
        target = torch.empty_like(rows)
        copy_s = bench.seconds(lambda: target.copy_(rows), sizes.repeats)
    moved = 2 * rows.numel() * rows.element_size()  # read and written
    times = {"lookup": statistics.median(lookup_s), "copy": statistics.median(copy_s)}
    rates = {f"{key}_gb_per_s": moved / seconds / 1e9 for key, seconds in times.items()}
    spread_ms = [1000 * min(lookup_s), 1000 * max(lookup_s)]
    return rates | {"time_ratio": times["lookup"] / times["copy"], "spread_ms": spread_ms}
