"""What `evaluate` writes, without scoring anything. Real runs: tests/integration/test_evaluation.py."""

import json

import pytest

from gpsd_dist import evaluate, trained_run
from gpsd_dist.checkpoint import storage


def test_metrics_of_a_crashed_write_are_those_of_before(tmp_path, monkeypatch):
    out = tmp_path / "new/test.json"
    trained_run.write_results({"click": {"auc": 0.5}}, out, None, None)

    def crash(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", crash)
        with pytest.raises(RuntimeError, match="killed"):
            trained_run.write_results({"click": {"auc": 0.75}}, out, None, None)
    assert json.loads(out.read_text()) == {"click": {"auc": 0.5}}
    trained_run.write_results({"click": {"auc": 0.75}}, out, None, None)
    assert json.loads(out.read_text()) == {"click": {"auc": 0.75}}
    assert [path.name for path in out.parent.iterdir()] == ["test.json"]


@pytest.mark.parametrize(("width", "shown"), [(0.01, "0.01000"), (float("nan"), "")])
def test_an_interval_that_is_not_known_is_not_shown(width, shown, capsys):
    evaluate._print({"click": {"auc": 0.5, "breakdown": {"half_width": {"auc": width}}}})
    out = capsys.readouterr().out
    assert "nan" not in out and ("+-" in out) == bool(shown) and shown in out


@pytest.mark.parametrize(
    "options",
    [
        ["--checkpoint", "a", "--max_history_length", "9"],
        ["--baseline", "rates", "--data", "d", "--max_history_length", "9"],
        ["--baseline", "next_item_popularity", "--data", "d", "--max_history_length", "0"],
        ["--checkpoint", "a", "--window_days", "3"],
        ["--baseline", "next_item_popularity", "--data", "d", "--window_days", "0"],
        ["--baseline", "next_item_popularity", "--data", "d", "--window_days", "nan"],
    ],
    ids=str,
)
def test_history_and_window_are_for_the_baseline_that_has_them(options, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(options)
    assert caught.value.code == 2 and "goes with next_item_popularity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "rates", "--data", "d", "--min_item_count", "0"], "must be at least 1"),
        (["--baseline", "next_item_popularity", "--data", "d", "--min_item_count", "5"], "scores no candidates"),
    ],
    ids=str,
)
def test_item_counts_are_for_scores(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(options)
    assert caught.value.code == 2 and message in capsys.readouterr().err
