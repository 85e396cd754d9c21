"""`python -m gpsd_dist.checkpoint` beside a run that goes on, and deletes what is just being looked at."""

import dataclasses
import shutil

import pytest

from gpsd_dist.checkpoint import integrity, resume, retention, state, storage
from gpsd_dist.checkpoint.__main__ import main
from tests.unit.checkpoint.folders import STATE, add


@pytest.fixture
def vanishing(tmp_path, monkeypatch):
    """Two checkpoints, the first of which is deleted as soon as a function of `module` is called."""
    old = add(tmp_path, 2)
    add(tmp_path, 4)

    def vanish_before(module, name: str) -> None:
        call = getattr(module, name)

        def wrapped(*args):
            shutil.rmtree(old, ignore_errors=True)
            return call(*args)

        monkeypatch.setattr(module, name, wrapped)

    return vanish_before


def test_verify_tells_deletion_from_damage(vanishing, tmp_path, capsys):
    vanishing(integrity, "wrong_files")
    assert main(["verify", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step_00000002: not verified" in lines[0] and "step_00000004: ok, 4 files" in lines[1]


def test_a_missing_file_is_still_damage_where_the_state_is_there(tmp_path, capsys):
    (add(tmp_path, 2) / "__0_0.distcp").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert "__0_0.distcp is missing" in capsys.readouterr().out


def test_prune_goes_on_where_the_run_was_faster(vanishing, tmp_path, capsys):
    vanishing(storage, "delete")
    assert main(["prune", str(tmp_path), "--keep_last", "1"]) == 0
    assert [path.name for path in retention.step_folders(tmp_path / "checkpoints")] == ["step_00000004"]
    assert "kept: step_00000004" in capsys.readouterr().out


def test_list_shows_the_others(vanishing, tmp_path, capsys):
    vanishing(state, "read_run")
    assert main(["list", str(tmp_path)]) == 0
    assert "step_00000004" in capsys.readouterr().out


def test_names_of_metrics_are_text_and_neither_markup_nor_orders(tmp_path, monkeypatch, capsys):
    add(tmp_path, 2)
    metrics = {"\x1b]0;title\x07\x1b[31mred/auc": 0.5, "[bold]x/auc": 0.3, ":smile:/auc": 0.2}
    monkeypatch.setattr(state, "read_run", lambda _: dataclasses.replace(STATE, metrics=metrics))
    monkeypatch.setattr(resume, "epochs_done", lambda _: 1.0)
    assert main(["list", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b]0;title" in shown and "\\x1b[31mred/auc" in shown
    assert "[bold]x/auc" in shown and ":smile:/auc" in shown
