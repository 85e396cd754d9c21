"""The line on what freezing saves, by hand."""

import dataclasses
import re

import pytest

from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.plan.all_to_all import unsent_gradients
from gpsd_dist.plan.frozen import frozen_line
from gpsd_dist.tables.sharding import Cluster, Shard
from tests.helpers.synthetic import make_manifest
from tests.integration.tiny_data import tiny_run

ROWS, LOOKED_UP = 1 << 20, {"item": float(1 << 16), "tag": 7.0}


def _run(strategy="ST_SF", backward="fp32", **tables):
    run = tiny_run("finetune", "x", "y", strategy, "z", tables={"embedding_dim": 64} | tables)
    return dataclasses.replace(run, execution=ExecutionConfig(exchange_backward=backward))


def _line(run, ranks, sharding="row_wise"):
    """2^20 items over the ranks, of which each looks up 2^16; the tags are trained."""
    columns, value_bytes = run.tables.stored_dim, run.tables.frozen_value_bytes
    owners = [(rank, ROWS // ranks) for rank in range(ranks)] if sharding == "row_wise" else [(0, ROWS)]
    items = [Shard("item", run.freezes_tables, sharding, rank, n, columns, value_bytes) for rank, n in owners]
    tags = Shard("tag", False, "row_wise", 0, 40, 64)
    manifest = make_manifest(table_rows={"item": ROWS})
    return frozen_line(run, manifest, (*items, tags), LOOKED_UP, Cluster(ranks, ranks, "cpu"))


def _unsent_mib(line: str) -> float:
    return float(re.search(r"and ([\d.e-]+) MiB of them", line)[1])


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize(("ranks", "backward", "mib"), [(1, "fp32", 0.0), (4, "fp32", 12.0), (4, "bf16", 6.0)])
def test_gradients_that_are_not_sent(sharding, ranks, backward, mib):
    """2^16 rows of 64 float32 are 16 MiB, of which (W - 1) / W belong to others; mean over the ranks."""
    line = _line(_run(backward=backward), ranks, sharding)
    assert "frozen: 1,048,576 rows without optimizer state (4.0 MiB of row-wise Adagrad, 512.0 MiB of Adam" in line
    assert "the gradients of 65,536 rows (expected; 16 MiB) are not computed" in line
    assert _unsent_mib(line) == mib and f"MiB of them ({backward}) not sent" in line
    assert line.count("\n") == 0 and "kept as" not in line


def test_half_precision_rows_would_have_sent_float32_gradients():
    line = _line(_run(frozen_dtype="fp16"), 2)
    assert line.endswith("kept as fp16 in 128.0 instead of 256.0 MiB") and _unsent_mib(line) == 8.0


def test_columns_are_counted_once():
    pieces = tuple(Shard("item", True, "column_wise", rank, 10, 128) for rank in range(2))
    unsent = unsent_gradients(pieces, {"item": 6.0}, Cluster(2, 2, "cpu"))
    assert unsent.total.tolist() == [6 * 128 * 4] * 2


def test_nothing_is_said_where_nothing_is_frozen():
    assert _line(_run("ST"), 2) == ""
