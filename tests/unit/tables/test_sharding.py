"""Options of the fused optimizers. Layouts and results: tests/integration/test_sharding.py."""

import pytest
import torch

from gpsd_dist.config import CUDA_ONLY_SPARSE_OPTIMIZERS, SPARSE_OPTIMIZERS, OptimizerConfig, TablesConfig
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.schema import Table
from gpsd_dist.tables import sharding
from gpsd_dist.tables.collections import Tables

CONFIG = TablesConfig(embedding_dim=8)


def _tables() -> Tables:
    return Tables((Table("item", 10, "x"),), (), CONFIG, torch.device("meta"))


@pytest.mark.parametrize("name", CUDA_ONLY_SPARSE_OPTIMIZERS)
def test_optimizer_without_cpu_kernel_is_refused_before_any_collective(name):
    with pytest.raises(ValueError, match=f"'{name}' has no CPU kernel .* use 'rowwise_adagrad'"):
        sharding.shard_tables(
            _tables(), CONFIG, OptimizerConfig(name, 0.1), Runtime(0, 1, 0, torch.device("cpu")), seed=0
        )


def test_weight_decay_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match=r"sparse weight_decay 0.1: .*set it to 0"):
        sharding._optimizer_arguments(OptimizerConfig("rowwise_adagrad", 0.1, weight_decay=0.1))


def test_every_listed_optimizer_is_built():
    assert set(sharding._OPTIMIZERS) == set(SPARSE_OPTIMIZERS)
