"""What a rank does in a step, against counts by hand and against batches that are really made."""

import dataclasses

import numpy as np
import pytest

from gpsd_dist.config import DataConfig, PretrainConfig, TrainConfig
from gpsd_dist.plan import workload as workloads
from gpsd_dist.plan.workload import DataShape, data_shape, expected_distinct, with_assumptions, with_table_rows
from gpsd_dist.schema import read_manifest
from tests.helpers.synthetic import make_manifest, write_dataset
from tests.integration.tiny_data import tiny_run

SHAPE = DataShape(10.0, 5.5, 3.0, {"tags": 2.0, "interests": 1.0}, {}, ())


def test_distinct_rows_by_hand():
    assert expected_distinct(2, 2) == pytest.approx(1.5)
    assert expected_distinct(2, 2, np.array([3.0, 1.0])) == pytest.approx((1 - 1 / 16) + (1 - 9 / 16))
    assert expected_distinct(2, 1, np.array([3.0, 1.0]), uniform_draws=1) == pytest.approx(
        (1 - 1 / 4 * 1 / 2) + (1 - 3 / 4 * 1 / 2)
    )
    assert expected_distinct(2, 0, np.array([1.0, 0.0]), uniform_draws=2) == pytest.approx(1.5)
    assert expected_distinct(5, 0) == 0 and expected_distinct(1, 9) == 1 and expected_distinct(0, 9) == 0
    assert expected_distinct(10**9, 1000) == pytest.approx(1000, rel=1e-5)
    assert expected_distinct(7, 10**6) == pytest.approx(7)


def test_distinct_rows_against_drawing():
    random = np.random.default_rng(0)
    counts = 1 / np.arange(1, 301)
    drawn = [
        len(set(random.choice(300, 200, p=counts / counts.sum())) | set(random.integers(0, 300, 100)))
        for _ in range(400)
    ]
    assert expected_distinct(300, 200, counts, 100) == pytest.approx(np.mean(drawn), rel=0.01)


def test_step_of_a_rank_by_hand():
    """4 requests of 10 tokens and 3 candidates: 40 + 12 items; tags: 2 in each bag of both, and 4 x 1 interests."""
    manifest = make_manifest(table_rows={"item": 10**9, "tag": 10**9})
    run = tiny_run("finetune", "x", "y")
    step = workloads.workload(run, manifest, ("item", "tag"), SHAPE, 4.0)
    assert (step.requests, step.tokens, step.candidates, step.negatives) == (4.0, 40.0, 12.0, 0)
    assert step.unique_rows["item"] == pytest.approx(52, rel=1e-4)
    assert step.unique_rows["tag"] == pytest.approx(2 * 52 + 4, rel=1e-4)
    assert step.candidate_keys == 12 * 11


@pytest.mark.parametrize(
    ("per", "parts", "negatives"),
    [("group", 1, 2 * 16), ("group", 3, 6 * 16), ("request", 3, 4 * 16), ("position", 1, 36 * 16)],
)
def test_negatives_of_a_step(per, parts, negatives):
    manifest = make_manifest(table_rows={"item": 10**9})
    pretrain = PretrainConfig(negatives_per=per, num_negative_groups=2, num_negatives=16)
    run = tiny_run("pretrain", "x", "y", pretrain=pretrain, train=TrainConfig(micro_batches=parts))
    step = workloads.workload(run, manifest, ("item",), SHAPE, 4.0)
    assert step.negatives == negatives and step.candidates == 0 and step.positions == 36
    assert step.unique_rows["item"] == pytest.approx(40 + negatives, rel=1e-4)


def test_requests_follow_rows_or_tokens_that_the_model_sees():
    rows = tiny_run("finetune", "x", "y", data=DataConfig(global_batch_rows=512))
    assert workloads.training_requests(rows, SHAPE, 64) == 8
    tokens = tiny_run("finetune", "x", "y", data=DataConfig(global_batch_rows=0, global_batch_tokens=2400))
    assert workloads.training_requests(tokens, SHAPE, 4) == 60  # 2400 / 10 tokens / 4 ranks


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, seed=1, num_rows=200, max_history_length=30)
    return folder


def test_shape_is_measured_after_truncation(data_dir):
    manifest = read_manifest(data_dir)
    run = tiny_run("finetune", data_dir, "y", data={"max_history_length": 10})
    shape, whole = (data_shape(r, manifest, "train") for r in (run, dataclasses.replace(run, data=DataConfig())))
    split = manifest.split("train")
    stored = split.num_history_tokens / 200
    assert whole.history < stored * 1.2 and shape.history < 0.7 * whole.history
    assert shape.candidates == split.num_candidates / 200
    assert (shape.history + 1) / 2 <= shape.context <= 5.5  # at most that of histories of 10
    assert 1.2 < shape.bag_sizes["tags"] < 1.8  # 0 to 3 entries
    assert set(shape.counts) == {table.name for table in manifest.tables}
    assert "first 100 rows of train" in " ".join(shape.notes)  # of two files


def test_without_the_files_the_manifest_decides_and_it_is_said(data_dir, tmp_path):
    manifest = read_manifest(data_dir)
    shape = data_shape(tiny_run("finetune", tmp_path, "y"), manifest, "train")
    assert shape.history == 10 and shape.context == 5.5 and shape.counts == {}
    assert shape.bag_sizes == {"tags": 1.0, "interests": 1.0}
    notes = " ".join(shape.notes)
    assert "files of train are not here" in notes and "no vocab/*.parquet" in notes


def test_assumptions_replace_what_was_measured(data_dir):
    manifest = read_manifest(data_dir)
    measured = data_shape(tiny_run("finetune", data_dir, "y"), manifest, "train")
    assumed = with_assumptions(measured, mean_history=7.0, candidates=2.0, table_rows={"item": 10**8})
    assert (assumed.history, assumed.context, assumed.candidates) == (7.0, 4.0, 2.0)
    assert "item" not in assumed.counts and "tag" in assumed.counts
    assert len(assumed.notes) == len(measured.notes) + 3
    assert with_assumptions(measured, mean_history=None, candidates=None, table_rows={}) == measured


def test_table_sizes_are_checked():
    manifest = with_table_rows(make_manifest(), {"item": 10**8})
    assert manifest.table("item").num_rows == 10**8 and manifest.table("tag").num_rows == 40
    with pytest.raises(
        ValueError, match=r"no table 'itme', the data set has \['item'.*; tag=2: a table has at least 3"
    ):
        with_table_rows(make_manifest(), {"itme": 10, "tag": 2})
