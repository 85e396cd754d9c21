"""The plan of a run against the run itself, on two gloo ranks: layout, bytes that are held, bytes that are sent."""

import dataclasses
import json
import pathlib
from unittest import mock

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from gpsd_dist.assembly import assemble, looked_up_tables
from gpsd_dist.batch.lookup import lookup_of
from gpsd_dist.config import OptimizerConfig
from gpsd_dist.plan.all_to_all import step_traffic, unsent_gradients
from gpsd_dist.plan.estimate import Scenario, estimate, model_size
from gpsd_dist.plan.memory import memory
from gpsd_dist.plan.workload import Workload, data_shape, expected_distinct
from gpsd_dist.schema import read_manifest
from gpsd_dist.tables.collections import Tables
from gpsd_dist.tables.sharding import Cluster, plan_tables, readable, shards_of, table_names
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.helpers.synthetic import write_dataset
from tests.integration.tiny_data import NUM_ITEMS, NUM_TAGS, cpu_runtime, tiny_run, train_batch, write_tiny_data

pytestmark = pytest.mark.timeout(420)  # the fixture starts ranks with their own limit

RANKS = 2
CLUSTER = Cluster(RANKS, RANKS, "cpu")
CASES = {
    "row_wise": {},
    "table_wise": {"tables": {"sharding": {"item": "table_wise", "tag": "table_wise"}, "embedding_dim": 16}},
    "column_wise": {"tables": {"sharding": {"item": "column_wise"}, "embedding_dim": 256}},
    "adagrad": {"sparse": OptimizerConfig("adagrad", 0.1)},
    "sgd": {"sparse": OptimizerConfig("sgd", 0.1)},
    "frozen": {"strategy": "ST_SF", "init_checkpoint": "not read here"},
}


def _case(name: str, data_dir, output_dir="nothing"):
    return tiny_run("finetune", data_dir, output_dir, **CASES[name])


class Sent(TorchDispatchMode):
    """Adds up what this rank sends to others by all-to-all, by dtype; seen where TorchRec hands it to gloo."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        self.bytes = {torch.int64: 0, torch.float32: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) == "c10d.alltoall_base_.default":
            _, tensor, _, _, splits = args[:5]
            if splits:  # without: sizes of what comes next
                others = sum(splits) - splits[self.rank]
                self.bytes[tensor.dtype] += others * tensor.element_size()
        return func(*args, **(kwargs or {}))


def _bytes_of(tensor) -> int:
    return sum(shard.tensor.nbytes for shard in tensor.local_shards())


@mock.patch("torch.cuda.is_available", new=lambda: False)  # CLUSTER has CPUs
def _look_up_everything(rank: int, world_size: int, data_dir) -> dict[str, dict]:
    """Every rank looks up all rows of both tables and sends back gradients."""
    measured = {}
    for name in CASES:
        run = _case(name, data_dir)
        tables = assemble(run, read_manifest(run.data_dir), cpu_runtime(rank, world_size)).tables
        lookup = lookup_of(
            ("item", "tag"), torch.cat((torch.arange(NUM_ITEMS), torch.arange(NUM_TAGS))), [NUM_ITEMS, NUM_TAGS]
        )
        with Sent(rank) as forward:
            rows = tables(lookup)
        trained = [value for value in rows.values() if value.requires_grad]
        with Sent(rank) as backward:
            torch.autograd.backward(trained, [torch.ones_like(value) for value in trained])
        measured[name] = {
            "plan": tables.plan,
            "shards": tables.shards,
            "tables": sum(_bytes_of(weight) for weight in tables.weights().values()),
            "optimizer": sum(_bytes_of(v) for state in tables.optimizer_state().values() for v in state.values()),
            "indices": forward.bytes[torch.int64],
            "rows": forward.bytes[torch.float32],
            "gradients": backward.bytes[torch.float32],
        }
    return measured


@mock.patch("torch.cuda.is_available", new=lambda: False)  # CLUSTER has CPUs
def _train_an_epoch(rank: int, world_size: int, run) -> dict[str, float]:
    """Means per step."""
    trainer = Trainer(run, cpu_runtime(rank, world_size))
    unique = np.zeros(2)
    with Sent(rank) as sent:
        for batches in trainer.loader:
            train_batch(trainer, batches)
            unique += batches[0].lookup.length_per_key()
    trainer.loader.close()
    steps = trainer.step
    return {"bytes": sum(sent.bytes.values()) / steps, "item": unique[0] / steps, "tag": unique[1] / steps}


def _both(rank: int, world_size: int, data_dir, run):
    return _look_up_everything(rank, world_size, data_dir), _train_an_epoch(rank, world_size, run)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    """Enough items that the taste of a user hardly shows in the number of distinct ones."""
    folder = tmp_path_factory.mktemp("wide")
    write_tiny_data(folder, num_items=1201)
    return folder


def _epoch_run(data_dir, output_dir):
    return tiny_run("finetune", data_dir, output_dir, data={"global_batch_rows": 16})


@pytest.fixture(scope="module")
def measured(tmp_path_factory, data_dir, wide_dir):
    """([rank] case -> bytes, [rank] means of an epoch)."""
    folder = tmp_path_factory.mktemp("two")
    run = _epoch_run(wide_dir, folder / "run")
    return tuple(zip(*run_distributed(_both, RANKS, folder, data_dir, run, timeout_s=300), strict=True))


def _planned(name, data_dir):
    run, manifest = _case(name, data_dir), read_manifest(data_dir)
    tables = Tables(looked_up_tables(run, manifest), run.frozen_tables, run.tables, torch.device("meta"))
    names = table_names(tables)
    plan = plan_tables(tables, run.tables, run.sparse, CLUSTER)
    return run, manifest, shards_of(plan, names)


@pytest.mark.parametrize("name", CASES)
def test_layout_is_that_of_training(measured, data_dir, name):
    run, _, shards = _planned(name, data_dir)
    assert readable(shards, run.tables) == measured[0][0][name]["plan"]
    assert shards == measured[0][0][name]["shards"]


@pytest.mark.parametrize("name", CASES)
def test_tables_and_optimizer_hold_what_was_planned(measured, data_dir, name):
    run, manifest, shards = _planned(name, data_dir)
    nothing = Workload(1.0, 1.0, 1.0, 1.0, 0, {"item": 0.0, "tag": 0.0})
    planned = memory(run, shards, model_size(run, manifest), CLUSTER, nothing, nothing)
    assert planned.tables.tolist() == [measured[0][rank][name]["tables"] for rank in range(RANKS)]
    assert planned.optimizer.tolist() == [measured[0][rank][name]["optimizer"] for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_send_what_was_planned(measured, data_dir, name):
    _, _, shards = _planned(name, data_dir)
    planned = step_traffic(shards, {"item": float(NUM_ITEMS), "tag": float(NUM_TAGS)}, 0, CLUSTER)
    found = [measured[0][rank][name] for rank in range(RANKS)]
    assert planned.rows.total.tolist() == [entry["rows"] for entry in found]
    assert planned.gradients.total.tolist() == [entry["gradients"] for entry in found]
    assert planned.indices.total.tolist() == [entry["indices"] for entry in found]


def test_freezing_saves_what_the_trained_table_sends(measured, data_dir):
    """Every rank looks up all rows of both tables: what it sends back for them, with and without the items."""
    run, _, shards = _planned("frozen", data_dir)
    gradients = {name: [entry[name]["gradients"] for entry in measured[0]] for name in ("row_wise", "frozen")}
    unsent = unsent_gradients(shards, {"item": float(NUM_ITEMS), "tag": float(NUM_TAGS)}, CLUSTER)
    assert unsent.total.mean() == np.mean(gradients["row_wise"]) - np.mean(gradients["frozen"]) > 0
    assert run.tables.stored_dim == 16


def test_step_of_training_is_as_large_as_planned(measured, wide_dir):
    """46 rows in 3 steps of at most 16, so 15.3 on average. Draws of a user are not quite independent, hence 10 %."""
    run, manifest = _epoch_run(wide_dir, "nothing"), read_manifest(wide_dir)
    cluster = dataclasses.replace(CLUSTER, memory_bytes=2**33)
    planned = estimate(Scenario(run, manifest, data_shape(run, manifest, "train"), cluster))
    share = 46 / 3 / 16
    for table in ("item", "tag"):
        found = np.mean([epoch[table] for epoch in measured[1]])
        assert planned.training.unique_rows[table] * share == pytest.approx(found, rel=0.1)
    sent = (planned.traffic.total.total - planned.traffic.dense.total).mean() * share
    assert sent == pytest.approx(np.mean([epoch["bytes"] for epoch in measured[1]]), rel=0.1)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_peak_of_a_step_is_as_planned(one_rank, tmp_path, stage):
    """All memory that torch allocates in one step on CPU, above what it held before. Within 20 %."""
    write_dataset(tmp_path / "data", seed=0, num_rows=300, num_files=1, table_rows={"item": 5000})
    run = tiny_run(
        stage,
        tmp_path / "data",
        tmp_path / "run",
        data={"max_history_length": 30, "global_batch_rows": 300},
        tables={"embedding_dim": 64},
        model={"layers": 4, "width": 64, "heads": 4},
        pretrain={"num_negative_groups": 8, "num_negatives": 256},
    )
    trainer = Trainer(run, one_rank)
    (batches,) = trainer.loader
    train_batch(trainer, batches)
    trainer.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_batch(trainer, batches)
    trainer.loader.close()
    measured = _peak_bytes(profiler, tmp_path / "trace.json")
    shape = data_shape(run, trainer.manifest, "pretrain" if stage == "pretrain" else "train")
    cluster = Cluster(1, 1, "cpu", 2**36)
    found = estimate(Scenario(run, trainer.manifest, shape, cluster))
    assert found.training.tokens == pytest.approx(sum(b.num_read_tokens for b in batches), rel=1e-6)
    gradients = 4 * found.size.parameters  # held, but freed by zero_grad before the step
    planned = found.memory.step[0] + gradients
    assert planned == pytest.approx(measured, rel=0.2)


def _peak_bytes(profiler, path: pathlib.Path) -> int:
    """Largest sum of allocations minus frees, in time order."""
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        running += event["args"]["Bytes"]
        peak = max(peak, running)
    return peak


def test_distinct_rows_of_real_batches(one_rank, tmp_path):
    """Frequencies of the vocabulary and independent draws, against batches of a skewed data set."""
    write_dataset(tmp_path / "data", seed=3, num_rows=400, num_files=1, table_rows={"item": 3000})
    run = tiny_run("pretrain", tmp_path / "data", tmp_path / "run", data={"global_batch_rows": 100})
    trainer = Trainer(run, one_rank)
    unique = [float(batches[0].lookup.length_per_key()[0]) for batches in trainer.loader]
    trainer.loader.close()
    assert len(unique) == 4
    shape = data_shape(run, trainer.manifest, "pretrain")
    draws = 100 * shape.history
    expected = expected_distinct(2998, draws, shape.counts["item"], 2 * 16)
    assert expected == pytest.approx(np.mean(unique), rel=0.1)
