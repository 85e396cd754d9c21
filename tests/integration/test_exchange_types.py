"""Rows and gradients that travel between ranks in half precision."""

import pathlib

import numpy as np
import pytest
import torch
from torchrec.distributed.types import CommOp

from gpsd_dist.batch.lookup import lookup_of
from gpsd_dist.config import OptimizerConfig, TablesConfig
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.plan.all_to_all import step_traffic
from gpsd_dist.schema import Table
from gpsd_dist.tables.all_to_all_codec import all_to_all_codecs
from gpsd_dist.tables.collections import Tables
from gpsd_dist.tables.sharding import Cluster, Shard, shard_tables
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import NUM_ITEMS, cpu_runtime

CONFIG = TablesConfig(embedding_dim=16, init_std=1.0)
LR, TINY = 0.5, 1e-6  # gradients of 1e-6 are what a mean over 1e5 positions gives; fp16 has a step of 6e-8 there


def _step(rank: int, world_size: int, executions: list[ExecutionConfig]) -> list[tuple[torch.Tensor, ...]]:
    """(rows that were looked up, what the update added to them) for each way of exchange, from the same weights."""
    found = []
    for execution in executions:
        tables = Tables((Table("item", NUM_ITEMS, "x"),), (), CONFIG, torch.device("meta"))
        runtime = cpu_runtime(rank, world_size)
        sharded = shard_tables(tables, CONFIG, OptimizerConfig("sgd", LR), runtime, 0, execution)
        sharded.set_learning_rate(LR)
        index = torch.arange(2 + rank, NUM_ITEMS, 2)  # every rank needs rows of both
        rows = sharded(lookup_of(("item",), index, [len(index)]))["item"]
        gradient = TINY * torch.randn(rows.shape, generator=torch.Generator().manual_seed(rank))
        torch.autograd.backward(rows, gradient / LR * world_size)
        # the update is far below float32's resolution of the weights: read it off weights of 0
        with torch.no_grad():
            for shard in sharded.weights()["item"].local_shards():
                shard.tensor.zero_()
        again = sharded(lookup_of(("item",), index, [len(index)]))["item"]
        torch.autograd.backward(again, gradient / LR * world_size)
        moved = sharded(lookup_of(("item",), index, [len(index)]))["item"]
        found.append((rows.detach(), moved.detach(), gradient))
    return found


@pytest.mark.equivalence
@pytest.mark.parametrize(("name", "bits"), [("fp16", 11), ("bf16", 8)])
def test_half_precision_exchange_rounds_rows_and_gradients_once(tmp_path, name, bits):
    """Relative error of one rounding, also of gradients that fp16 alone would keep 3 bits of."""
    ways = [ExecutionConfig(), ExecutionConfig(exchange_forward=name), ExecutionConfig(exchange_backward=name)]
    for exact, rows, gradients in run_distributed(_step, 2, pathlib.Path(tmp_path), ways):
        assert not torch.equal(rows[0], exact[0])
        torch.testing.assert_close(rows[0], exact[0], rtol=2**-bits, atol=1e-7)
        assert torch.equal(gradients[0], exact[0])
        torch.testing.assert_close(exact[1], -exact[2], rtol=1e-5, atol=1e-12)
        assert not torch.equal(gradients[1], exact[1])
        torch.testing.assert_close(gradients[1], exact[1], rtol=2**-bits, atol=1e-10)


def test_out_of_range_gradients_stop_at_the_largest_number():
    codecs = all_to_all_codecs(ExecutionConfig(exchange_backward="fp16"))[CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name]
    values = torch.tensor([1e6, -1e6, 1.0])
    assert codecs.backward.decode(codecs.backward.encode(values)).tolist() == [65504 / 1024, -65504 / 1024, 1.0]


def test_plan_counts_what_is_sent():
    cluster, rows = Cluster(2, 2, "cuda"), {"item": 10.0}
    shards = tuple(Shard("item", False, "row_wise", rank, 50, 8) for rank in range(2))
    full, half = (
        step_traffic(shards, rows, 0, cluster, e) for e in (ExecutionConfig(), ExecutionConfig(False, "bf16"))
    )
    assert np.array_equal(2 * half.rows.total, full.rows.total)
    assert np.array_equal(half.gradients.total, full.gradients.total)
