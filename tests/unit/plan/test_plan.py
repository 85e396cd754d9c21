"""The command: exit status, text, JSON, and flags that training accepts."""

import dataclasses
import json
import re
import shlex

import pytest

from gpsd_dist.config import gin_cli
from gpsd_dist.data.run_manifest import read_run_manifest
from gpsd_dist.plan import __main__ as plan
from gpsd_dist.preflight import check_options_against_data
from gpsd_dist.schema import Table, read_manifest, unbounded_fingerprint, write_manifest
from tests.helpers.synthetic import write_dataset

SPACIOUS = ["--world_size", "8", "--local_world_size", "4", "--hbm_gib", "80"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, seed=1, num_rows=50)
    files = ("stage/finetune", "data/synthetic", "model/l1h32a4")
    return [f"--gin_file=configs/{name}.gin" for name in files] + [
        "--gin.GLOBAL_BATCH_ROWS=512",
        f"--gin.DATA_DIR={folder}",
    ]


def _folder(options) -> str:
    return options[-1].partition("DATA_DIR=")[2]


@pytest.fixture(scope="module")
def managed_options(options, tmp_path_factory):
    """The same data, but items count as 64-bit ids."""
    folder = tmp_path_factory.mktemp("managed")
    manifest = read_manifest(_folder(options))
    item = Table("item", 200, unbounded_fingerprint("managed", 200))
    tables = (item, *(table for table in manifest.tables if table.name != "item"))
    write_manifest(dataclasses.replace(manifest, tables=tables, unbounded={"item": "managed"}), folder)
    return [*options[:-1], f"--gin.DATA_DIR={folder}"]


def _plan(capsys, *argv) -> tuple[int, str]:
    status = plan.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_run_that_fits(options, capsys, tmp_path):
    status, text = _plan(capsys, *options, *SPACIOUS, "--json", str(tmp_path / "new" / "plan.json"))
    assert status == 0
    assert "on 8 ranks of 80 GiB on 2 machines" in text
    assert "table item: trainable, row_wise: 25 x 64 on ranks 0-7" in text
    assert re.search(r"fits: peak \d+\.\d\d GiB of 68.00 GiB usable", text)
    written = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert written["fits"] and written["options"] == [] and written["cluster"]["world_size"] == 8
    memory = written["memory_bytes"]
    assert memory["tables"] == [25 * 64 * 4] * 8 and memory["optimizer"] == [25 * 4] * 8
    assert memory["peak"][0] == pytest.approx(
        memory["held"][0]
        + max(
            memory["activations"] + memory["working"] + memory["loss"] + memory["buffers"][0], memory["validation"][0]
        )
    )
    total = written["sent_bytes"]["total"]
    assert len(total["same_machine"]) == len(total["other_machines"]) == 8
    assert written["flops"]["step"] > 0 and written["step_of_a_rank"]["requests"] == 64


def test_run_that_does_not_fit_and_flags_that_exist(options, capsys, tmp_path):
    large = ["--table_rows", "item=400_000_000", "tag=1000", "--mean_history", "20", "--candidates", "5"]
    adagrad = "--gin.sparse/OptimizerConfig.name=adagrad"
    status, text = _plan(capsys, *options, *SPACIOUS[:-1], "20", *large, adagrad, "--json", str(tmp_path / "plan.json"))
    assert status == 3
    assert "does not fit" in text and "TorchRec's planner refuses" in text
    assert "every history has 20 tokens (--mean_history)" in text and "5 candidates per request" in text
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["step_of_a_rank"]["tokens"] == 64 * 20 and written["step_of_a_rank"]["candidates"] == 64 * 5
    assert {option["fits"] for option in written["options"]} == {True, False}
    for option in written["options"]:
        if option["flags"].startswith("--world_size"):
            continue
        flags = shlex.split(option["flags"])
        assert gin_cli.load_run_config([*options, adagrad, "--gin.OUTPUT_DIR=x", *flags]).run, option
    fitting = next(option for option in written["options"] if option["fits"] and "world_size" not in option["flags"])
    again, _ = _plan(capsys, *options, *SPACIOUS[:-1], "20", *large, adagrad, *shlex.split(fitting["flags"]))
    assert again == 0


def test_what_training_would_refuse_or_needs_is_said(options, capsys):
    status, text = _plan(capsys, *options, "--world_size", "32", "--hbm_gib", "1", "--gin.GLOBAL_BATCH_ROWS=16")
    assert status == 0
    assert "training on 32 ranks also needs --gin.DataConfig.num_data_shards=32" in text
    assert "a rank has 0.50 requests per step" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["ExecutionConfig.pipeline=sparse_dist"], "looks rows up ahead of their step"),
        (["TablesConfig.sharding={'item': 'column_wise'}"], "'item' has managed ids and is column_wise"),
        (["ModelConfig.name=din", "ExecutionConfig.token_multiple=64"], "token_multiple with model 'din'"),
        (
            ["ModelConfig.name=din", "ExecutionConfig.activation_checkpointing=True"],
            "it has no blocks to compute again",
        ),
    ],
)
def test_what_training_refuses_is_refused_in_its_words(managed_options, capsys, flags, message):
    argv = [*managed_options, *(f"--gin.{flag}" for flag in flags)]
    run = gin_cli.load_run_config([*argv, "--gin.OUTPUT_DIR=x"]).run
    with pytest.raises(ValueError, match=message) as refused:
        check_options_against_data(run, read_run_manifest(run))
    assert _plan(capsys, *argv, *SPACIOUS) == (plan.MISTAKE, f"error: {refused.value}\n")


def test_a_data_set_without_labels_is_refused_where_it_would_be_scored(options, tmp_path, capsys):
    manifest = dataclasses.replace(read_manifest(_folder(options)), tasks=())
    write_manifest(manifest, tmp_path)
    argv = ["--gin_file=configs/stage/pretrain.gin", *options[1:-1], f"--gin.DATA_DIR={tmp_path}"]
    expected = f"error: {tmp_path} has no task, so there is nothing to score in 'valid'\n"
    assert _plan(capsys, *argv, *SPACIOUS) == (plan.MISTAKE, expected)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--table_rows", "itme=10"], "there is no table 'itme'"),
        (["--table_rows", "item"], "'item': expected TABLE=ROWS"),
        (["--table_rows", "item=100", "--table_rows", "item=200"], "--table_rows gives 'item' twice: 100 and 200"),
        (["--mean_history", "51"], r"--mean_history 51: the model sees 1 to 50 tokens"),
        (["--gin.TrainConfig.epoch=3"], "epoch"),
        (["--gin.DATA_DIR=nowhere"], "manifest.json does not exist"),
        (["--gin.TablesConfig.transfer=('itme',)"], "itme"),
    ],
)
def test_mistakes_are_explained(options, capsys, argv, message):
    status, text = _plan(capsys, *options, *SPACIOUS, *argv)
    assert status == 2 and re.search("^error: ", text, re.MULTILINE) and re.search(message, text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--world_size", "0", "--hbm_gib", "80"], "--world_size 0 must be above 0"),
        (["--world_size", "2", "--local_world_size", "4", "--hbm_gib", "80"], "--local_world_size 4 is larger"),
        (["--world_size", "2"], "--hbm_gib"),
        (["--world_size", "2", "--hbm_gib", "inf"], "--hbm_gib inf must be above 0 and finite"),
        (["--world_size", "2", "--hbm_gib", "nan"], "--hbm_gib nan must be above 0 and finite"),
    ],
)
def test_impossible_clusters_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        plan.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
