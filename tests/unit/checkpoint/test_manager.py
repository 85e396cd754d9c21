"""Which checkpoints of a folder count, on hand-made folders. Saving and loading: tests/integration."""

import dataclasses
import json
import math

import pytest
import torch

from gpsd_dist.checkpoint import manager
from gpsd_dist.distributed.runtime import Runtime

STATE = manager.RunState(
    step=3,
    data_position={"epoch": 0, "step": 3},
    progress={"best_value": -math.inf},
    metrics={"click/auc": 0.5},
    run_config={},
    manifest={},
    world_size=1,
)


def _checkpoints(output_dir, keep_last=2) -> manager.Checkpoints:
    return manager.Checkpoints(output_dir, Runtime(0, 1, 0, torch.device("cpu")), keep_last)


def _add(output_dir, step: int, is_complete=True):
    folder = output_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    if is_complete:
        state = dataclasses.replace(STATE, step=step)
        (folder / manager.STATE_NAME).write_text(json.dumps(dataclasses.asdict(state)))
    return folder


def _mark_best(output_dir, step: int):
    (output_dir / "checkpoints/best.json").write_text(json.dumps({"step": step, "metrics": {}}))


def test_no_folder_has_no_checkpoint(tmp_path):
    assert _checkpoints(tmp_path).latest() is None
    assert manager.best_step(tmp_path / "checkpoints") == -1


def test_newest_complete_checkpoint_counts(tmp_path):
    _add(tmp_path, 2)
    newest = _add(tmp_path, 10)
    assert _checkpoints(tmp_path).latest() == newest == manager.find(tmp_path, "last")


@pytest.mark.parametrize("name", ["step_00000020", ".step_00000020.partial", "step_20", "step_00000020.tmp", "copy"])
def test_half_written_and_foreign_folders_are_ignored(tmp_path, name):
    complete = _add(tmp_path, 10)
    half = tmp_path / "checkpoints" / name
    half.mkdir()
    (half / ".metadata").write_text("half")
    assert _checkpoints(tmp_path).latest() == complete
    assert manager.find(tmp_path, "last") == manager.find(tmp_path) == complete


@pytest.mark.parametrize("name", [".step_00000020.partial", "step_00000020.old"])
def test_foreign_folder_with_a_state_is_ignored(tmp_path, name):
    """`.partial` has its state shortly before it is renamed."""
    complete = _add(tmp_path, 10)
    _add(tmp_path, 20).rename(tmp_path / "checkpoints" / name)
    assert _checkpoints(tmp_path).latest() == complete
    assert manager.find(tmp_path, "last") == complete


def test_find_takes_the_best_unless_asked_for_the_last(tmp_path):
    best, last = _add(tmp_path, 4), _add(tmp_path, 9)
    _mark_best(tmp_path, 4)
    assert manager.find(tmp_path) == best
    assert manager.find(str(tmp_path), "last") == last
    assert manager.find(last) == last


def test_find_takes_the_last_where_the_best_is_gone(tmp_path):
    last = _add(tmp_path, 9)
    _mark_best(tmp_path, 4)
    assert manager.find(tmp_path) == last


@pytest.mark.parametrize("kind", ["missing", "empty", "incomplete"])
def test_find_says_what_it_looked_for(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "empty":
        folder.mkdir()
    if kind == "incomplete":
        _add(folder, 3, is_complete=False)
    with pytest.raises(ValueError, match="neither a run folder with a finished checkpoint nor a checkpoint") as error:
        manager.find(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(("best", "kept"), [(2, [2, 6, 8]), (8, [6, 8]), (None, [6, 8])])
def test_prune_keeps_the_best_and_the_last(tmp_path, best, kept):
    for step in (2, 4, 6, 8):
        _add(tmp_path, step)
    if best is not None:
        _mark_best(tmp_path, best)
    _checkpoints(tmp_path)._prune()
    folders = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert folders == [f"step_{step:08d}" for step in kept]


def test_state_survives_its_file(tmp_path):
    folder = _add(tmp_path, 3)
    assert manager.read_state(folder) == STATE


@pytest.mark.parametrize("text", ["", "{", '{"step": 3}', '{"steps": 3}', "[]"])
def test_broken_state_is_named(tmp_path, text):
    folder = _add(tmp_path, 3)
    (folder / manager.STATE_NAME).write_text(text)
    with pytest.raises(ValueError, match="cannot be read as a run state") as error:
        manager.read_state(folder)
    assert str(folder / manager.STATE_NAME) in str(error.value)
