"""The list of reported results, its order and its verdicts; and one real run of the reduced ones."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest

from benchmarks import experiments
from benchmarks.expected import (
    FAILED,
    MISS,
    PASS,
    SKIPPED,
    Experiment,
    Result,
    exit_status,
    judge,
    ordered,
    read_experiments,
)
from gpsd_dist.config.gin_cli import load_run_config
from tests.helpers import forked

ROOT = pathlib.Path(__file__).resolve().parents[3]
GIN_FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "experiments").glob("*.gin"))
LISTED = read_experiments()
ENTRY = {
    "name": "a/pre",
    "gin_file": "configs/experiments/quickstart_pretrain.gin",
    "overrides": [],
    "needs": None,
    "data": "synthetic",
    "split": "test",
    "metric": "click/auc",
    "expected": 0.7,
    "tolerance": 0.02,
    "minutes": 1.0,
    "reduced": False,
}


def made(name="a/x", *, needs=None, refit_of=None, **changes) -> Experiment:
    return dataclasses.replace(
        Experiment(**ENTRY | {"overrides": ()}), name=name, needs=needs, refit_of=refit_of, **changes
    )


def written(folder, *entries):
    path = folder / "expected.json"
    path.write_text(json.dumps([ENTRY | entry for entry in entries]))
    return path


# ---- the shipped list -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gin_file", [file for file in GIN_FILES if "/official_" not in file])
def test_every_experiment_file_has_an_expected_result(gin_file):
    assert [e.name for e in LISTED if e.gin_file == gin_file]


@pytest.mark.parametrize("experiment", LISTED, ids=lambda e: e.name)
def test_every_entry_builds_the_run_it_is_about(experiment, tmp_path):
    assert experiment.gin_file in GIN_FILES
    run = load_run_config(experiments.train_arguments(experiment, tmp_path)).run
    assert (run.data_dir, run.output_dir) == (str(tmp_path / "data" / experiment.data), str(tmp_path / experiment.name))
    assert run.init_checkpoint == (str(tmp_path / experiment.needs) if experiment.needs else "")
    assert run.refit_of == (str(tmp_path / experiment.refit_of) if experiment.refit_of else "")
    task = experiment.metric.split("/")[0]
    assert (run.stage == "pretrain") == (task == "next_item")
    assert (run.strategy == "NT") == (experiment.needs is None)
    assert experiment.split == ("valid" if task == "next_item" or experiment.name.endswith("_tune") else "test")


def test_the_list_can_be_ordered_and_reduced_ones_stand_alone():
    assert len(ordered(LISTED, {e.name for e in LISTED})) == len(LISTED)
    reduced = {e.name for e in LISTED if e.reduced}
    assert reduced and {e.name for e in ordered(LISTED, reduced)} == reduced


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"tolarance_": 0.1}], r"unknown fields \['tolarance_'\]"),
        ([{}, {}], "a/pre is there more than once"),
        ([{"name": "pre"}], "name 'pre' is not <group>/<run>"),
        ([{"name": "../pre"}], "is not <group>/<run>"),
        ([{"name": "data/pre"}], "is not <group>/<run>"),
        ([{"data": "movies"}], "data 'movies' is not one of"),
        ([{"metric": "auc"}], "metric 'auc' is not <task>/<metric>"),
        ([{"tolerance": 0}], "tolerance 0 and minutes 1.0 must be above 0"),
        ([{"data": "amazon_grocery", "reduced": True}], "is reduced, but 'amazon_grocery' needs raw files"),
        ([{"needs": "a/no"}], "a/pre needs 'a/no', which is not listed"),
        ([{"refit_of": "a/no"}], "a/pre needs 'a/no', which is not listed"),
        ([{}, {"name": "a/st", "refit_of": "a/pre", "overrides": ["--gin.SEED=1"]}], "which has other options"),
        ([{}, {"name": "a/st", "needs": "a/pre", "reduced": True}], "or only one of them is reduced"),
        ([{}, {"name": "a/st", "needs": "a/pre", "data": "amazon_grocery"}], "which has other data"),
    ],
)
def test_wrong_entries_are_named(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        read_experiments(written(tmp_path, *entries))


def test_a_missing_field_is_named_and_a_good_list_is_read(tmp_path):
    path = written(tmp_path, {}, {"name": "a/st", "needs": "a/pre", "overrides": ["--gin.STRATEGY=ST"]})
    first, second = read_experiments(path)
    assert (first, second.overrides) == (Experiment(**ENTRY | {"overrides": ()}), ("--gin.STRATEGY=ST",))
    entry = {name: value for name, value in ENTRY.items() if name != "split"}
    path.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"entry 0 \(a/pre\): unknown fields \[\], missing fields \['split'\]"):
        read_experiments(path)


# ---- order ----------------------------------------------------------------------------------------------------------


def names(chosen):
    return [experiment.name for experiment in chosen]


def test_what_is_needed_runs_first_and_once():
    listed = [
        made("a/final", needs="a/pre", refit_of="a/st"),
        made("a/st", needs="a/pre"),
        made("a/nt"),
        made("a/pre"),
    ]
    assert names(ordered(listed, {"a/final", "a/nt", "a/st"})) == ["a/pre", "a/st", "a/final", "a/nt"]
    assert names(ordered(listed, ["a/nt"])) == ["a/nt"]
    assert names(ordered(listed, ["a/st"])) == ["a/pre", "a/st"]


def test_unknown_names_and_circles_are_errors():
    with pytest.raises(ValueError, match=r"no experiment \['a/y'\]; there are \['a/x'\]"):
        ordered([made()], ["a/y"])
    with pytest.raises(ValueError, match="circle: a/x -> a/y -> a/x"):
        ordered([made("a/x", needs="a/y"), made("a/y", refit_of="a/x")], ["a/x"])


# ---- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "verdict"),
    [(0.7, PASS), (0.719, PASS), (0.681, PASS), (0.721, MISS), (0.679, MISS), (None, FAILED), (math.nan, FAILED)],
)
def test_a_result_passes_within_its_tolerance_on_both_sides(found, verdict):
    result = judge(made(), {"click": {"auc": found}, "buy": {"auc": 0.7}}, 2.0)
    assert (result.verdict, result.minutes) == (verdict, 2.0)
    assert result.found == (found if verdict != FAILED else None)


def test_a_metric_that_was_not_written_is_a_failure():
    for metrics in ({}, {"buy": {"auc": 0.7}}, {"click": {"gauc": 0.7}}):
        result = judge(made(), metrics, 2.0)
        assert result.verdict == FAILED and "click/auc" in result.note


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ([PASS, PASS], 0),
        ([PASS, SKIPPED], 0),
        ([PASS, MISS], 1),
        ([SKIPPED, FAILED], 1),
        ([SKIPPED], 2),
        ([], 2),
    ],
)
def test_exit_status(verdicts, status):
    assert exit_status([Result(made(), verdict) for verdict in verdicts]) == status


# ---- running --------------------------------------------------------------------------------------------------------


def test_absent_raw_data_are_reported_and_nothing_passes(tmp_path):
    chosen = [made("a/pre", data="amazon_grocery"), made("a/st", needs="a/pre", data="amazon_grocery")]
    results = experiments.run_all(chosen, tmp_path / "raw", tmp_path)
    assert [result.verdict for result in results] == [SKIPPED, SKIPPED]
    assert all(f"{tmp_path / 'raw' / 'amazon_grocery'} does not exist" in result.note for result in results)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [entry["experiment"]["name"] for entry in saved] == ["a/pre", "a/st"] and exit_status(results) == 2


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "a" / "x" / "precious").touch()
    with pytest.raises(ValueError, match="is not of this command"):
        experiments.earlier_record(tmp_path / "a" / "x")
    assert (tmp_path / "a" / "x" / "precious").exists()


def test_the_table_has_every_experiment_and_says_what_was_expected():
    results = [Result(made("a/x"), PASS, found=0.7123, minutes=1.26), Result(made("a/y"), SKIPPED, "no raw data")]
    columns = {column.header: list(column.cells) for column in experiments.table(results).columns}
    assert columns["experiment"] == ["a/x", "a/y"] and columns["found"] == ["0.7123", "-"]
    assert columns["minutes"] == ["1.3", "(1.0)"] and columns["note"] == ["", "no raw data"]


def command(*options):
    line = [sys.executable, "-m", "benchmarks.experiments", *map(str, options)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=840)


def test_wrong_names_stop_before_anything_runs(tmp_path):
    result = forked.run("benchmarks.experiments", "--names", "grocery/none", "--out_dir", tmp_path / "out")
    assert result.returncode == 2 and "there is no experiment ['grocery/none']" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reduced_experiments_are_reproduced_and_start_anew(tmp_path):
    result = command("--reduced", "--out_dir", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = {entry["experiment"]["name"]: entry for entry in json.loads((tmp_path / "results.json").read_text())}
    assert entries.keys() == {e.name for e in LISTED if e.reduced}
    assert {entry["verdict"] for entry in entries.values()} == {PASS}
    config = json.loads((tmp_path / "reduced" / "nt" / "experiment.json").read_text())["configuration"]
    assert config["run"]["strategy"] == "NT"
    # the first of them again: not kept, built data are, and the bits are the same
    again = command("--names", "reduced/nt", "--out_dir", tmp_path)
    assert again.returncode == 0 and "starts anew" in again.stdout and "is up to date" in again.stdout
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert entry["found"] == entries["reduced/nt"]["found"]
