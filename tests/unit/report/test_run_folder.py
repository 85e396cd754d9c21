"""Reading run folders: what is found, what is missing, what is broken."""

import json
import math
import os

import pytest

from benchmarks import experiments
from benchmarks.model_table import WALL_NAME
from gpsd_dist.metrics import recorder
from gpsd_dist.report import run_folder
from gpsd_dist.report.run_folder import find_runs, read_run, read_runs
from gpsd_dist.scaling.runs import PARAMETERS_NAME
from tests.helpers.run_folders import STEPS, scored, write_json, write_run


def test_metrics_are_looked_for_where_they_are_written():
    assert run_folder.METRICS_NAME == recorder.JSONL_NAME


def test_complete_run_has_no_problem(tmp_path):
    write_run(tmp_path / "a", "ST_SF", 3, scores={"test": scored(0.8), "holdout": scored(0.7)})
    run = read_run(tmp_path / "a", "a")
    assert run.problems == ()
    assert (run.config["strategy"], run.config["seed"], run.best_step, run.is_finished) == ("ST_SF", 3, STEPS[-2], True)
    assert [x for x, _ in run.series("valid/click/auc")] == list(STEPS)
    assert [x for x, _ in run.series("train/loss", "epoch")] == [0.5, 1.0, 1.5, 2.0]
    assert run.best_metrics["click/auc"] == pytest.approx(0.7)
    assert set(run.scores) == {"test", "holdout"} and run.scores["test"]["buy"]["auc"] == 0.8
    assert run.plan == "table item: frozen, row_wise"


def test_what_other_commands_leave_in_a_run_folder_is_no_problem(tmp_path):
    write_run(tmp_path / "a", scores={"test": scored(0.8)})
    write_json(tmp_path / "a" / PARAMETERS_NAME, {"dense_parameters": 20_001, "tower_parameters": 13_408})
    (tmp_path / "a" / WALL_NAME).write_text("84.2")
    write_json(tmp_path / "a" / experiments._RECORD, {"configuration": {"split": "test"}, "minutes": 1.5})
    run = read_run(tmp_path / "a", "a")
    assert run.problems == () and set(run.scores) == {"test"}


def test_runs_are_found_at_any_depth_and_once(tmp_path):
    for name in ("b/s1/nt", "b/s0/nt", "a"):
        write_run(tmp_path / name)
    os.symlink(tmp_path / "b", tmp_path / "b/s0/up")  # a loop, and the same runs again
    write_json(tmp_path / "b/s0/nt/checkpoints/metrics.jsonl", {})  # no run: in a checkpoint folder
    folders, problems = find_runs([tmp_path, tmp_path / "a", tmp_path / "b" / "s0"])
    assert [folder.relative_to(tmp_path).as_posix() for folder in folders] == ["a", "b/s0/nt", "b/s1/nt"]
    assert problems == []
    assert [run.label for run in read_runs(folders)] == ["a", "b/s0/nt", "b/s1/nt"]
    assert [run.label for run in read_runs(folders[1:])] == ["s0/nt", "s1/nt"]
    assert [run.label for run in read_runs(folders[:1])] == ["a"]


def test_folder_without_a_run_is_an_error_that_says_what_was_looked_for(tmp_path):
    (tmp_path / "empty/below").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty holds no run: looked for metrics\.jsonl in it and in 1 folders below"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match="absent is not a folder"):
        find_runs([tmp_path / "absent"])
    write_run(tmp_path / "full")
    with pytest.raises(ValueError, match="empty holds no run"):  # also beside a folder with one
        find_runs([tmp_path / "full", tmp_path / "empty"])
    write_json(tmp_path / "empty/killed/run_config.json", {"seed": 0})
    with pytest.raises(ValueError, match=r"run_config\.json only in .*killed"):
        find_runs([tmp_path / "empty"])


def test_run_that_logged_nothing_is_named(tmp_path):
    write_run(tmp_path / "a")
    write_json(tmp_path / "killed/run_config.json", {"seed": 0})
    folders, problems = find_runs([tmp_path])
    assert folders == [tmp_path / "a"]
    assert len(problems) == 1 and "killed: run_config.json but no metrics.jsonl" in problems[0]


@pytest.mark.parametrize(
    "name", ["config.gin", "run_config.json", "environment.json", "plan.txt", "metrics.jsonl", "checkpoints/best.json"]
)
def test_missing_file_is_named_and_the_rest_is_read(tmp_path, name):
    folder = write_run(tmp_path / "a", "FT")
    (folder / name).unlink()
    run = read_run(folder, "a")
    assert run.problems == (f"{folder / name} is missing",)
    assert run.best_step is None or run.best_step == STEPS[-2]
    assert (run.config == {}) == (name == "run_config.json") and (run.entries == ()) == (name == "metrics.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("run_config.json", "{", "not valid JSON"),
        ("run_config.json", "[1]", "holds [1], expected an object"),
        ("environment.json", "{}", "holds {}, expected an object"),
        ("environment.json", "[" * 100_000, "not valid JSON"),
        ("plan.txt", b"\xff\xfe", "cannot be read"),
        ("checkpoints/best.json", '{"step": "x", "metrics": {}}', '"step" (a whole number)'),
        ("checkpoints/best.json", '{"step": 30, "metrics": {"click/auc": "high"}}', "click/auc should be a number"),
        ("test.json", '{"rows": [1]}', "is not a result of gpsd_dist.evaluate"),
        ("test.json", '{"click": {"auc": true}}', "auc should be a number"),
    ],
)
def test_broken_file_is_named_and_the_rest_is_read(tmp_path, name, content, expected):
    folder = write_run(tmp_path / "a")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    run = read_run(folder, "a")
    (problem,) = run.problems
    assert str(folder / name) in problem and expected in problem
    assert len(run.entries) == len(STEPS)


def test_broken_lines_of_metrics_are_named_and_the_others_stay(tmp_path):
    folder = write_run(tmp_path / "a")
    good = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('nonsense\n{"epoch": 1}\n[2]\n' + good + '{"step": 5, "train/lo')
    run = read_run(folder, "a")
    assert len(run.entries) == len(STEPS)
    told = [problem.removeprefix(f"{folder / 'metrics.jsonl'}, ") for problem in run.problems]
    assert told == [
        "line 1 is not JSON, left out",
        "line 2 is not an entry of a run (no step), left out",
        "line 3 is not an entry of a run (no step), left out",
        "line 8 is cut off: the run was writing it",
    ]


def test_null_and_nan_become_nan_and_are_counted(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0]["train/loss"] = lines[2]["train/loss"] = None
    lines[1]["valid/buy/auc"] = math.nan  # the trainer writes null; a foreign writer may not
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder, "a")
    assert [math.isnan(value) for _, value in run.series("train/loss")] == [True, False, True, False]
    assert run.problems == (f"{folder / 'metrics.jsonl'}: not finite: train/loss (2 x), valid/buy/auc (1 x)",)


def test_checkpoint_that_did_not_finish_is_not_read(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "checkpoints/step_00000099").mkdir()
    assert read_run(folder, "a").state["step"] == STEPS[-1]
    (folder / f"checkpoints/step_{STEPS[-1]:08d}/run_state.json").unlink()
    run = read_run(folder, "a")
    assert run.state == {} and run.is_finished is None
    assert run.problems == (f"{folder / 'checkpoints'} has no complete checkpoint (step_*/run_state.json)",)


def test_a_step_that_was_saved_again_is_read_from_its_last_attempt(tmp_path):
    folder = write_run(tmp_path / "a")
    last = folder / f"checkpoints/step_{STEPS[-1]:08d}"
    state = json.loads((last / "run_state.json").read_text())
    for attempt in (2, 10):
        write_json(last.with_name(f"{last.name}.{attempt}") / "run_state.json", state | {"world_size": attempt})
    assert read_run(folder, "a").state["world_size"] == 10


def test_checkpoints_in_another_folder_are_read_there_and_those_behind_a_url_are_named(tmp_path):
    folder = write_run(tmp_path / "a", options={"train.checkpoint_dir": str(tmp_path / "elsewhere")})
    (tmp_path / "elsewhere").mkdir()
    (folder / "checkpoints").rename(tmp_path / "elsewhere/checkpoints")
    run = read_run(folder, "a")
    assert run.problems == () and run.best_step == STEPS[-2] and run.state["step"] == STEPS[-1]
    remote = write_run(tmp_path / "b", options={"train.checkpoint_dir": "s3://bucket/b"})
    run = read_run(remote, "b")
    assert len(run.problems) == 1 and "its checkpoints are in s3://bucket/b" in run.problems[0]
    assert run.best_step is None and run.state == {}
