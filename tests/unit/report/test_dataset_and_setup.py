"""Data summary, options that differ, environment, commands, speed."""

import dataclasses
import json
import shlex

import pytest

from gpsd_dist.report import dataset, setup
from gpsd_dist.report.families import group
from gpsd_dist.report.run_folder import find_runs, read_runs
from tests.helpers.run_folders import MANIFEST, write_data, write_json, write_run


def runs_in(root):
    return read_runs(find_runs([root])[0])


def families(root):
    runs = runs_in(root)
    return group(runs, dataset.data_sets(runs)[0])


def texts(table) -> list[list[str]]:
    return [[cell.text for cell in row.cells] for rows in table.groups for row in rows]


# ---- data -----------------------------------------------------------------------------------------------------------


def test_summary_of_the_data_folder(tmp_path):
    write_run(tmp_path / "runs/a", data_dir=write_data(tmp_path / "data"))
    (data_set,), problems = dataset.data_sets(runs_in(tmp_path / "runs"))
    assert problems == [] and data_set.origin == f"{tmp_path / 'data'}/manifest.json"
    assert texts(dataset.splits_table(data_set.manifest))[:2] == [
        ["pretrain", "50", "1,500", "30.0", "-", "-", "-"],
        ["train", "4,321", "98,765", "22.9", "8,642", "2020-09-13 12:26", "2020-09-14 12:26"],
    ]
    assert texts(dataset.tables_table(data_set.manifest)) == [["item", "1,234", "item (history/candidate)"]]
    assert texts(dataset.sources_table(data_set.manifest)) == [["raw/log.csv", "3.0 MiB", "abcdef012345"]]
    facts = dict(dataset.facts(data_set.manifest, data_set.origin))
    assert facts["tasks"] == "click, buy (given click)" and facts["split rule"] == "by the phase of the moon"
    assert facts["skipped raw rows"] == "17 rows of nobody" and facts["numerical features"] == "age"


@pytest.mark.parametrize(
    ("versions", "names"),
    [
        (("0001-abcdef01",), ["OUT"]),
        (("0001-abcdef01", "0002-abcdef02"), ["OUT/versions/0001-abcdef01", "OUT/versions/0002-abcdef02"]),
    ],
)
def test_a_data_set_is_named_by_its_folder_unless_two_versions_are_there(tmp_path, versions, names):
    for number, version in enumerate(versions):
        write_run(tmp_path / f"runs/{number}", data_dir=write_data(tmp_path / "OUT/versions" / version))
    found, _ = dataset.data_sets(runs_in(tmp_path / "runs"))
    assert [data_set.name for data_set in found] == [f"{tmp_path}/{name}" for name in names]


def test_data_folder_that_is_gone_is_replaced_by_the_checkpoint(tmp_path):
    write_run(tmp_path / "a", data_dir=tmp_path / "gone")
    (data_set,), (problem,) = dataset.data_sets(runs_in(tmp_path))
    assert "gone is not here" in problem and "what their checkpoints say" in problem
    assert data_set.manifest.source == "handmade" and data_set.origin == "a checkpoint of these runs"


def test_data_folder_serves_a_run_without_checkpoint(tmp_path):
    folder = write_run(tmp_path / "runs/a", data_dir=write_data(tmp_path / "data"))
    (folder / "checkpoints/step_00000040/run_state.json").unlink()
    (data_set,), problems = dataset.data_sets(runs_in(tmp_path / "runs"))
    assert data_set.manifest.source == "handmade" and problems == []


def test_neither_folder_nor_checkpoint_is_named(tmp_path):
    folder = write_run(tmp_path / "runs/a", data_dir=tmp_path / "gone")
    (folder / "checkpoints/step_00000040/run_state.json").unlink()
    (data_set,), (problem,) = dataset.data_sets(runs_in(tmp_path / "runs"))
    assert data_set.manifest is None and "no checkpoint has a manifest" in problem


def test_rebuilt_data_folder_is_named_and_the_checkpoint_counts(tmp_path):
    split = dataclasses.replace(MANIFEST.splits[1], num_rows=4_320)
    changed = dataclasses.replace(MANIFEST, splits=(MANIFEST.splits[0], split, MANIFEST.splits[2]))
    write_run(tmp_path / "runs/a", data_dir=write_data(tmp_path / "data", changed))
    (data_set,), (problem,) = dataset.data_sets(runs_in(tmp_path / "runs"))
    assert "has been built again since a were trained" in problem
    assert texts(dataset.splits_table(data_set.manifest))[1][1] == "4,321"


def test_data_folder_that_was_rebuilt_alike_is_the_same(tmp_path):
    again = dataclasses.replace(MANIFEST, command="another command", options={"engine": "other"})
    write_run(tmp_path / "runs/a", data_dir=write_data(tmp_path / "data", again))
    assert dataset.data_sets(runs_in(tmp_path / "runs"))[1] == []


def test_broken_manifest_is_named(tmp_path):
    write_json(tmp_path / "data/manifest.json", {"schema_version": 99})
    write_run(tmp_path / "runs/a", data_dir=tmp_path / "data")
    (data_set,), (problem,) = dataset.data_sets(runs_in(tmp_path / "runs"))
    assert "schema version 99" in problem and data_set.manifest.source == "handmade"


def test_manifest_of_a_checkpoint_may_be_of_another_shape(tmp_path):
    folder = write_run(tmp_path / "a", data_dir=tmp_path / "gone")
    state = folder / "checkpoints/step_00000040/run_state.json"
    content = json.loads(state.read_text())
    content["manifest"] = {"splits": "none", "tables": [7], "features": None, "tasks": 3, "skipped": [], "source": 5}
    state.write_text(json.dumps(content))
    (data_set,), problems = dataset.data_sets(runs_in(tmp_path))
    assert data_set.manifest is None
    assert "the manifest in the checkpoint of a is left out: it has schema version None" in problems[0]


# ---- options --------------------------------------------------------------------------------------------------------


def test_options_that_differ_have_a_column_and_the_others_are_listed(tmp_path):
    write_run(tmp_path / "a", "NT")
    write_run(tmp_path / "b", "NT", 1)
    write_run(tmp_path / "c", "NT", options={"sparse.peak_lr": 0.01, "task_new": ["x"]})
    (family,) = families(tmp_path)
    table = setup.option_differences(family)
    assert [column.text for column in table.columns] == ["configuration", "seeds", "sparse.peak_lr", "task_new"]
    assert [row[1:] for row in texts(table)] == [["0, 1", "0.1", "(absent)"], ["0", "0.01", "x"]]
    shared = dict(setup.shared_options(family))
    assert shared["dense.peak_lr"] == "0.005" and shared["strategy"] == "NT"
    assert not {"sparse.peak_lr", "seed", "output_dir"} & set(shared)


def test_groups_are_compared_with_each_other(tmp_path):
    write_run(tmp_path / "a", stage="pretrain", options={"train.epochs": 15})
    write_run(tmp_path / "b")
    write_run(tmp_path / "c", "ST")
    table = setup.family_differences(families(tmp_path))
    assert texts(table) == [
        ["stage", "pretrain", "finetune"],
        ["strategy", "NT", "NT; ST"],
        ["train.epochs", "15", "10"],
    ]
    assert setup.family_differences(families(tmp_path / "b")) is None


def test_seeds_alone_are_no_difference(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", seed=seed)
    assert setup.option_differences(families(tmp_path)[0]) is None


# ---- environment, plan, commands, speed -----------------------------------------------------------------------------


def test_environment_is_told_once_and_differences_by_run(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"s{seed}", seed=seed, world_size=2 if seed == 1 else 1)
    shared, table = setup.environments(runs_in(tmp_path))
    assert dict(shared) | {"torch": "2.13.0+cpu", "fbgemm-gpu": "not installed", "commit": "c0ffee"} == dict(shared)
    assert texts(table) == [["s0, s2", "1"], ["s1", "2"]]
    assert setup.environments(runs_in(tmp_path / "s0"))[1] is None


def test_equal_plans_are_told_once(tmp_path):
    for name, strategy in (("a", "NT"), ("b", "ST_SF"), ("c", "ST")):
        write_run(tmp_path / name, strategy)
    plans = setup.plans(families(tmp_path))
    assert plans == [("a, c", "table item: trainable, row_wise"), ("b", "table item: frozen, row_wise")]


@pytest.mark.parametrize(
    ("world_size", "launcher"), [(1, ["python"]), (4, ["torchrun", "--nproc_per_node", "4"])], ids=["one", "four"]
)
def test_command_can_be_typed_again(tmp_path, world_size, launcher):
    write_run(tmp_path / "a", seed=3, world_size=world_size)
    (run,) = runs_in(tmp_path)
    given = ["--gin_file", "configs/stage/finetune.gin", "--gin.SEED=3", "--gin.TRANSFER_TABLES=('item',)"]
    assert shlex.split(setup.command(run)) == [*launcher, "-m", "gpsd_dist.train", *given]
    run.environment["plugin"] = "/my models/best.py"
    assert shlex.split(setup.command(run))[:2] == ["GPSD_PLUGIN=/my models/best.py", launcher[0]]


def test_command_that_was_not_recorded_is_none(tmp_path):
    (write_run(tmp_path / "a") / "environment.json").unlink()
    assert setup.command(runs_in(tmp_path)[0]) is None


def test_throughput_is_the_median_and_memory_the_peak(tmp_path):
    folder = write_run(tmp_path / "a", world_size=2)
    table = setup.throughput(families(tmp_path))
    row = dict(zip([column.text for column in table.columns], texts(table)[0], strict=True))
    assert row == {
        "run": "a",
        "device": "cpu",
        "ranks": "2",
        "steps": "40",
        "time": "30 s",
        "examples/s": "125",
        "tokens/s": "4,025",
        "step ms": "50",
        "data wait": "1.20 %",
        "CPU time": "40 s",
        "peak RSS GiB": "1.40",
    }
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "perf/tokens_per_s": null, "perf/peak_cuda_gib": 7.5}\n')
    table = setup.throughput(families(tmp_path))
    row = dict(zip([column.text for column in table.columns], texts(table)[0], strict=True))
    assert row["tokens/s"] == "4,025" and row["peak CUDA GiB"] == "7.50" and row["steps"] == "50"
