"""The number of bags that a table's rows are spread over (see `bags_per_table`) does not change a bit of a run."""

import dataclasses
from unittest import mock

import pytest

from gpsd_dist.config import RunConfig
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import differing, read_checkpoint, step_folder, tiny_run, train_losses, train_runs
from tests.integration.unbounded_data import write_unbounded_data

pytestmark = [pytest.mark.equivalence, pytest.mark.timeout(300)]
STEPS = 4
MANY_BAGS = (7, 8192)  # several rows in each bag; at most one row in each
MIXED = {"item": "column_wise", "tag": "row_wise"}


def _run(stage, data_dir, folder, strategy="NT", init="", *, sharding=None, pipeline="plain", micro_batches=1):
    run = tiny_run(
        stage,
        data_dir,
        folder,
        strategy,
        init,
        tables={"sharding": sharding or {}, "embedding_dim": 256},
        train={"max_steps": STEPS, "micro_batches": micro_batches},
    )
    return dataclasses.replace(run, execution=dataclasses.replace(run.execution, pipeline=pipeline))


def _runs(data_dir, managed_dir, folder) -> list[RunConfig]:
    """Every kind of plan and table: row, column and table wise, frozen, small, managed; plain and prefetched."""
    pretrained, table_wise = folder / "pretrain", {"item": "table_wise", "tag": "table_wise"}
    return [
        _run("pretrain", data_dir, pretrained, sharding=MIXED, pipeline="sparse_dist"),
        _run("finetune", data_dir, folder / "frozen", "ST_SF", pretrained, pipeline="sparse_dist", micro_batches=2),
        _run("finetune", data_dir, folder / "table_wise", sharding=table_wise),
        _run("pretrain", managed_dir, folder / "managed"),
    ]


def _train(rank: int, world_size: int, folders, num_bags: int) -> None:
    with mock.patch("gpsd_dist.batch.lookup.bags_per_table", return_value=num_bags) as asked:
        train_runs(rank, world_size, _runs(*folders))
        assert asked.call_count >= 4 * STEPS


def _train_with_each(rank: int, world_size: int, data_dir, managed_dir, root) -> None:
    for num_bags in (1, *MANY_BAGS):
        _train(rank, world_size, (data_dir, managed_dir, root / f"{world_size}_{num_bags}"), num_bags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, one_rank):
    managed_dir, root = tmp_path_factory.mktemp("managed_data"), tmp_path_factory.mktemp("bags")
    write_unbounded_data(managed_dir, {"item": ("managed", 32), "tag": ("managed", 14)})
    _train_with_each(0, 1, data_dir, managed_dir, root)
    run_distributed(_train_with_each, 2, root, data_dir, managed_dir, root, timeout_s=200)
    return root


@pytest.mark.parametrize("name", ["pretrain", "frozen", "table_wise", "managed"])
@pytest.mark.parametrize("num_bags", MANY_BAGS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_many_bags_give_the_bits_of_one(trained, world_size, num_bags, name):
    one, many = (trained / f"{world_size}_{bags}" / name for bags in (1, num_bags))
    assert train_losses(one) == train_losses(many) and len(train_losses(one)) == STEPS
    states = [read_checkpoint(step_folder(folder, STEPS)) for folder in (one, many)]
    assert any(path.startswith("table.") for path in states[0]) and not differing(*states)
    assert name == "frozen" or differing(read_checkpoint(one / "initial"), states[0])  # it was trained
