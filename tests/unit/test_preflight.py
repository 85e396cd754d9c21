"""Rules between a run and its data set."""

import dataclasses

import pytest

from gpsd_dist.config import ModelConfig, RunConfig, TablesConfig, TrainConfig
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.preflight import check_options_against_data
from gpsd_dist.schema import Split
from tests.helpers.synthetic import make_manifest


def test_all_problems_of_a_run_with_its_data_come_at_once():
    no_rows = Split("valid", (), 0, 0, 0, None, None)
    manifest = dataclasses.replace(make_manifest(), unbounded={"item": "managed"}, splits=(no_rows,))
    execution = ExecutionConfig(token_multiple=64, activation_checkpointing=True, pipeline="sparse_dist")
    tables = TablesConfig(sharding={"item": "column_wise"}, small_table_max_rows=0)
    parts = {"execution": execution, "model": ModelConfig("din"), "tables": tables, "train": TrainConfig(patience=2)}
    with pytest.raises(ValueError) as caught:
        check_options_against_data(RunConfig("finetune", "d", "o", **parts), manifest)
    words = ("token_multiple with model 'din': only the transformer", "only hstu, sasrec, transformer have")
    words += ("pipeline 'sparse_dist' looks", "table 'item' has managed ids and is column_wise", "patience 2 and")
    assert [word for word in words if word not in str(caught.value)] == []
