"""Rules between a run and its data set."""

import dataclasses

import pytest

from gpsd_dist.config import DataConfig, FinetuneConfig, ModelConfig, RunConfig, TablesConfig, TrainConfig
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.preflight import check_options_against_data
from gpsd_dist.schema import Feature, Split
from tests.helpers.synthetic import make_manifest


def test_all_problems_of_a_run_with_its_data_come_at_once():
    no_rows = Split("valid", (), 0, 0, 0, None, None)
    splits = (no_rows, Split("train", (), 5, 9, 5, 1, 2))
    manifest = dataclasses.replace(make_manifest(), unbounded={"item": "managed"}, splits=splits)
    execution = ExecutionConfig(token_multiple=64, activation_checkpointing=True, pipeline="sparse_dist")
    tables = TablesConfig(sharding={"item": "column_wise"}, small_table_max_rows=0)
    parts = {"execution": execution, "model": ModelConfig("din"), "tables": tables, "train": TrainConfig(patience=2)}
    with pytest.raises(ValueError) as caught:
        check_options_against_data(RunConfig("finetune", "d", "o", **parts), manifest)
    words = ("token_multiple with model 'din': only the transformer", "only hstu, sasrec, transformer have")
    words += ("pipeline 'sparse_dist' looks", "table 'item' has managed ids and is column_wise", "patience 2 and")
    assert [word for word in words if word not in str(caught.value)] == []


NOTHING = [
    ("finetune", Split("train", (), 0, 0, 0, None, None), {}, "split 'train' of d has no rows"),
    ("pretrain", Split("pretrain", (), 0, 0, 0, None, None), {}, "split 'pretrain' of d has no rows"),
    ("finetune", Split("train", (), 5, 0, 5, 1, 2), {}, "every history in split 'train' of d is empty"),
    (
        "finetune",
        Split("train", (), 5, 9, 5, 1, 2),
        {"click": 5, "buy": 0},
        "task 'buy' has no observed label in split",
    ),
]


@pytest.mark.parametrize(("stage", "split", "observed", "words"), NOTHING)
def test_data_that_nothing_can_be_learnt_from_are_refused_with_advice(stage, split, observed, words):
    valid = Split("valid", (), 5, 9, 5, 3, 4)
    options = {"observed_labels": observed}
    manifest = dataclasses.replace(make_manifest(), splits=(valid, split), options=options)
    with pytest.raises(ValueError, match=words) as caught:
        check_options_against_data(RunConfig(stage, "d", "o"), manifest)
    assert "build" in str(caught.value)


def test_a_task_without_labels_may_be_left_out():
    splits = (Split("valid", (), 5, 9, 5, 3, 4), Split("train", (), 5, 9, 5, 1, 2))
    manifest = dataclasses.replace(make_manifest(), splits=splits, options={"observed_labels": {"buy": 0}})
    run = RunConfig("finetune", "d", "o", finetune=FinetuneConfig(task_weights={"buy": 0.0}))
    check_options_against_data(run, manifest)


FROZEN_ROWS = [
    ({"item": "managed"}, 9, "frozen_rows of table 'item', whose ids are managed: .* leave it out"),
    ({"item": "hashed"}, 9, "frozen_rows of table 'item', whose ids are hashed"),
    ({}, 10**6, r"frozen_rows: 1,000,000 of table 'item', which has \d+ rows, so none would be trained"),
]


@pytest.mark.parametrize(("unbounded", "num_rows", "words"), FROZEN_ROWS)
def test_frozen_rows_are_the_first_rows_of_a_vocabulary(unbounded, num_rows, words):
    splits = (Split("valid", (), 5, 9, 5, 3, 4), Split("train", (), 5, 9, 5, 1, 2))
    manifest = dataclasses.replace(make_manifest(), splits=splits, unbounded=unbounded)
    run = RunConfig("finetune", "d", "o", "ST_SF", "p", tables=TablesConfig(frozen_rows={"item": num_rows}))
    with pytest.raises(ValueError, match=words):
        check_options_against_data(run, manifest)
    check_options_against_data(dataclasses.replace(run, tables=TablesConfig(frozen_rows="auto")), manifest)


@pytest.mark.parametrize(("given", "says"), [(DataConfig.max_history_length, False), (60, True)])
def test_a_history_longer_than_the_data_is_spoken_of_only_where_somebody_asked_for_it(given, says, caplog):
    splits = (Split("valid", (), 5, 9, 5, 3, 4), Split("train", (), 5, 9, 5, 1, 2))
    manifest = dataclasses.replace(make_manifest(), splits=splits, max_history_length=40)
    run = RunConfig("finetune", "d", "o", data=DataConfig(max_history_length=given))
    check_options_against_data(run, manifest)
    assert (f"max_history_length {given} has no effect" in caplog.text) == says


@pytest.mark.parametrize("given", ["rates", "item", "age", "count_total_item"])
def test_an_offset_must_be_a_number_of_candidates_as_the_log_has_it(given):
    splits = (Split("valid", (), 5, 9, 5, 3, 4), Split("train", (), 5, 9, 5, 1, 2))
    counted = Feature("count_total_item", ("candidate",), "numerical", counts="item", log=True)
    manifest = make_manifest()
    manifest = dataclasses.replace(manifest, splits=splits, features=(*manifest.features, counted))
    run = RunConfig("finetune", "d", "o", finetune=FinetuneConfig(offset=given))
    words = rf"offset '{given}' is no numerical feature of candidates .*; d has \['price', 'discount'\]: name one"
    with pytest.raises(ValueError, match=words):
        check_options_against_data(run, manifest)
    check_options_against_data(dataclasses.replace(run, finetune=FinetuneConfig(offset="discount")), manifest)


def test_rates_are_an_offset_of_the_first_task_alone():
    splits = (Split("valid", (), 5, 9, 5, 3, 4), Split("train", (), 5, 9, 5, 1, 2))
    rates = Feature("rates", ("candidate",), "numerical", counts="item", prior_exposures=20)
    without = dataclasses.replace(make_manifest(), splits=splits)
    manifest = dataclasses.replace(without, features=(*without.features, rates))
    run = RunConfig("finetune", "d", "o", finetune=FinetuneConfig(offset="rates"))
    check_options_against_data(run, manifest)
    with pytest.raises(ValueError, match=r"offset 'rates' is no numerical feature .*build the data with --rates 20"):
        check_options_against_data(run, without)
    other = FinetuneConfig(offset="rates", task_weights={manifest.tasks[0].name: 0.0})
    with pytest.raises(ValueError, match=f"log-odds of '{manifest.tasks[0].name}', whose weight is 0"):
        check_options_against_data(dataclasses.replace(run, finetune=other), manifest)
