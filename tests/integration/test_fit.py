"""`python -m gpsd_dist.fit`: stopped in the middle, gone on, kept, refused for other data.

The one that is stopped is started as a user does; what goes on does so in this process, and forks its trainings from
one that has done the imports.
"""

import contextlib
import io
import json
import logging
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from gpsd_dist import commands
from gpsd_dist.checkpoint import manager
from gpsd_dist.config import run_config_from_dict
from gpsd_dist.fit import __main__ as fit
from gpsd_dist.fit import procedure
from gpsd_dist.fit.display import Display
from gpsd_dist.fit.steps import FLOOR_NAMES
from gpsd_dist.metrics.auc_interval import auc_by_user
from gpsd_dist.metrics.scores import read_scores
from tests.helpers import forked
from tests.helpers.commands import TINY_GIN, environment
from tests.integration.tiny_data import write_tiny_data

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT_S = 500
pytestmark = pytest.mark.timeout(TIMEOUT_S)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    write_tiny_data(folder / "data", rows={"train": 60, "valid": 40, "test": 40})
    (folder / "tiny.gin").write_text(TINY_GIN + "EPOCHS = 2\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_starts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(procedure, "start_server", forked.command_server)
        yield


@contextlib.contextmanager
def log_restored():
    """A fit that scores in this process sets the log up; other tests need theirs."""
    logger = logging.getLogger("gpsd_dist")
    before = logger.handlers, logger.level, logger.propagate
    try:
        yield
    finally:
        logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def own_logging():
    with log_restored():
        yield


def options(root, *more: str) -> list[str]:
    files = ["--gin_file", "configs/stage/finetune.gin", "--gin_file", str(root / "tiny.gin")]
    files += ["--pretrain_gin_file", "configs/stage/pretrain.gin", "--pretrain_gin_file", str(root / "tiny.gin")]
    strategies = ["--strategies", "NT,ST_SF", "--nproc", "1"]
    return ["--data", str(root / "data"), "--out", str(root / "run"), *strategies, *files, *more]


@pytest.fixture(scope="module")
def finished(root):
    """Asked to stop while it pretrains, and run again: standard error of both, standard output of the second."""
    command = [sys.executable, "-m", "gpsd_dist.fit", *options(root)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as child:
        log = root / "run/pretrain/metrics.jsonl"
        while child.poll() is None and not (log.is_file() and log.read_text()):
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        _, stopped = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 130, stopped
    out, error = io.StringIO(), io.StringIO()
    with log_restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = fit.main(options(root))
    assert status == 0, error.getvalue()
    return stopped, error.getvalue(), out.getvalue()


def test_a_stopped_fit_goes_on(finished):
    stopped, again, _ = finished
    assert stopped.splitlines()[-1] == "stopped; what was trained is saved, and the same command goes on from there"
    assert "smoothed rates on valid: kept; click AUC 0." in again
    assert "[5/14] NT: " in again and "chosen on valid: " in again


def test_the_result_is_complete(finished, root):
    run, summary = root / "run", json.loads((root / "run/summary.json").read_text())
    rows = {(row["strategy"], row["task"]): row for row in summary["rows"]}
    assert list(rows) == [("NT", "click"), ("NT", "buy"), ("ST_SF", "click"), ("ST_SF", "buy")]
    for (strategy, task), row in rows.items():
        assert (
            row["split"] == "test"
            and row["auc"] == json.loads((run / strategy.lower() / "test.json").read_text())[task]["auc"]
        )
    best = max(("NT", "ST_SF"), key=lambda name: rows[name, "click"]["valid_auc"])
    assert summary["chosen"] == f"{best} refit" and json.loads((run / "fit.json").read_text())["chosen"] == best.lower()
    assert {row["label"] for row in summary["floors"]} == set(FLOOR_NAMES.values())
    (refit,) = (row for row in summary["refit"] if row["task"] == "click")
    columns = read_scores(run / f"{best.lower()}_refit/test_scores.parquet")["click"]
    judged = auc_by_user(columns["score"], columns["label"], columns["user_hash"])
    assert (judged.auc, judged.half_width) == pytest.approx((refit["auc"], refit["auc_half_width"]), abs=1e-12)
    chosen, trees = summary["chosen"], ("boosted trees", "boosted trees refit")
    assert chosen in summary["verdict"] and trees[0] not in summary["verdict"].replace(trees[1], "")
    page = (run / "report.html").read_text()
    assert summary["verdict"] in page and "What to try next" in page
    assert f"\n{summary['verdict']}\n" in finished[2]


def test_every_step_can_be_typed(finished, root):
    lines = (root / "run/commands.sh").read_text().splitlines()
    typed = [line for line in lines if line.startswith("python ")]
    assert len(typed) == 14 and lines[2] == "# popularity on valid"
    kinds = [line.split()[2] for line in typed]
    assert kinds.count("gpsd_dist.train") == 4 and kinds.count("gpsd_dist.evaluate") == 10
    saved = json.loads((root / "run/st_sf/run_config.json").read_text())
    assert run_config_from_dict(saved).init_checkpoint == str(root / "run/pretrain")


def test_a_finished_fit_is_only_shown_again(finished, root, capsys):
    before = {path: path.stat().st_mtime_ns for path in (root / "run").rglob("checkpoints/**/*")}
    broken = root / "run/floors/rates/test_scores.parquet"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])  # is made again
    assert fit.main(options(root)) == 0
    shown = capsys.readouterr()
    assert shown.err.count(": kept") == 13 and broken.read_bytes() == content
    assert json.loads((root / "run/summary.json").read_text())["verdict"]
    assert before == {path: path.stat().st_mtime_ns for path in (root / "run").rglob("checkpoints/**/*")}


def test_a_folder_of_other_data_or_options_is_refused(finished, root, tmp_path, capsys):
    write_tiny_data(tmp_path / "other", seed=1, rows={"train": 61, "valid": 40, "test": 40})
    assert fit.main([*options(root), "--data", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert f"{root / 'run'} belongs to other data ({root / 'data'}" in error and "use another --out" in error
    assert fit.main([*options(root), "--gin.EPOCHS=3"]) == 2
    assert "was made with other options (overrides [] there, ['--gin.EPOCHS=3'] now)" in capsys.readouterr().err


def test_fit_is_not_started_by_torchrun(root, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert fit.main(options(root)) == 2 and "leave out torchrun" in capsys.readouterr().err


def test_a_failing_training_is_named_with_its_reason(root, tmp_path, capsys):
    wrong = ["--gin.FinetuneConfig.task_weights={'no_task': 1.0}", "--out", str(tmp_path), "--strategies", "NT"]
    assert fit.main([*options(root), *wrong]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-4].startswith("error: FinetuneConfig.task_weights names ['no_task']")
    assert "the same command goes on" in error
    assert "FinetuneConfig.task_weights names" in (tmp_path / "logs/NT.log").read_text()


def test_a_budget_ends_a_training_with_a_validation(root, tmp_path, monkeypatch, capsys):
    """Its time is up after some steps: it does one more, validates, is scored, and counts as finished."""
    started = threading.Event()

    def on_line(display, line, real=Display.on_line):
        real(display, line)
        if "step 3/" in line:
            started.set()

    def wait(child, deadline_s):
        if deadline_s < float("inf"):
            started.wait(TIMEOUT_S / 2)
            child.terminate()
        return child.wait(), deadline_s < float("inf")

    monkeypatch.setattr(commands, "_wait", wait)
    monkeypatch.setattr(Display, "on_line", on_line)
    more = ["--gin.EPOCHS=20000", "--gin.PATIENCE=0", "--budget_minutes", "30", "--strategies", "NT", "--no_refit"]
    assert fit.main([*options(root), *more, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    last = manager.read_state(manager.find(tmp_path / "nt", "last"))
    assert f"stopped by the budget at step {last.step}" in shown.err
    assert last.progress["is_finished"] and last.run_config["train"]["max_steps"] == last.step < 1000
    assert "click/auc" in last.metrics
    assert f"--gin.TrainConfig.max_steps={last.step}" in (tmp_path / "commands.sh").read_text()
    assert "--budget_minutes ended" in shown.out


@pytest.fixture(scope="module")
def daily(tmp_path_factory):
    """Two runs of `--daily` on the same log of four days: one goes through, one is stopped and goes on."""
    root = tmp_path_factory.mktemp("daily")
    write_tiny_data(root / "data", rows={"train": 60, "valid": 40, "test": 40})
    (root / "tiny.gin").write_text(TINY_GIN + "EPOCHS = 2\n")
    return root


@pytest.mark.slow
def test_days_that_were_stopped_go_on_to_the_same_numbers(daily, monkeypatch, capsys):
    def command(name: str, *more: str) -> list[str]:
        words = [word.replace(str(daily / "run"), str(daily / name)) for word in options(daily)]
        start = words.index("--strategies")
        return [*words[:start], "--strategies", "FT_SF", *words[start + 2 :], "--daily", "--max_age", "2", *more]

    assert fit.main(command("whole")) == 0
    shown = capsys.readouterr()
    whole = json.loads((daily / "whole/daily.json").read_text())
    assert f"\n{whole['verdict']}\n" in shown.out and "going on with yesterday's model is" in whole["verdict"]
    assert {line["label"] for line in whole["lines"]["click"]} >= {"from scratch", "warm start", "smoothed rates"}

    calls, asked = [], threading.Event()

    def on_line(display, line, real=Display.on_line):
        real(display, line)
        if "step 3/" in line and len(calls) == 4:  # in the middle of the second day
            asked.set()

    def wait(child, deadline_s):
        calls.append(child)
        if len(calls) == 4:
            asked.wait(TIMEOUT_S / 2)
            child.terminate()
            return child.wait(), True
        return child.wait(), False

    with monkeypatch.context() as patch:
        patch.setattr(commands, "_wait", wait)
        patch.setattr(Display, "on_line", on_line)
        assert fit.main(command("parts", "--budget_minutes", "600")) == 0
    stopped = capsys.readouterr()
    assert "left out, the budget ended in it" in stopped.err
    assert "- --budget_minutes ended before" in stopped.out
    assert fit.main(command("parts")) == 0
    again = capsys.readouterr()
    assert again.err.count(": kept") >= 6
    parts = json.loads((daily / "parts/daily.json").read_text())

    def numbers(made):
        return [{k: v for k, v in line.items() if k != "cpu_s"} for lines in made["lines"].values() for line in lines]

    assert numbers(parts) == numbers(whole)
    assert fit.main([*command("whole"), "--warm_epochs", "3"]) == 2
    assert "made with other options (warm_epochs 1 there, 3 now)" in capsys.readouterr().err
