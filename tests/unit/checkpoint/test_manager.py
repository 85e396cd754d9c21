"""Which checkpoints of a folder count, on hand-made folders. Saving and loading: tests/integration."""

import dataclasses
import errno
import json
import shutil

import fsspec
import pytest
import torch

from gpsd_dist.checkpoint import integrity, manager, retention, saving, storage
from gpsd_dist.checkpoint.state import OtherVersion, read_run
from gpsd_dist.config import TrainConfig
from gpsd_dist.distributed.runtime import Runtime
from tests.unit.checkpoint.folders import STATE, add, mark_best


def _checkpoints(output_dir, **train) -> saving.Checkpoints:
    return saving.Checkpoints(output_dir, Runtime(0, 1, 0, torch.device("cpu")), TrainConfig(**train))


def test_no_folder_has_no_checkpoint(tmp_path):
    assert _checkpoints(tmp_path).latest() is None and _checkpoints(tmp_path).best() is None
    assert manager.best_step(tmp_path / "checkpoints") == -1
    assert manager.newest_intact(tmp_path / "checkpoints") is None


def test_newest_complete_checkpoint_counts(tmp_path):
    add(tmp_path, 2)
    newest = add(tmp_path, 10)
    assert _checkpoints(tmp_path).latest() == newest == manager.find(tmp_path, "last")


@pytest.mark.parametrize("name", ["step_00000020", ".step_00000020.partial", "step_20", "step_00000020.tmp", "copy"])
def test_half_written_and_foreign_folders_are_ignored(tmp_path, name):
    complete = add(tmp_path, 10)
    half = tmp_path / "checkpoints" / name
    half.mkdir()
    (half / ".metadata").write_text("half")
    assert _checkpoints(tmp_path).latest() == complete
    assert manager.find(tmp_path, "last") == manager.find(tmp_path) == complete


@pytest.mark.parametrize("name", [".step_00000020.partial", "step_00000020.old"])
def test_foreign_folder_with_a_state_is_ignored(tmp_path, name):
    """`.partial` has its state shortly before it is renamed."""
    complete = add(tmp_path, 10)
    add(tmp_path, 20).rename(tmp_path / "checkpoints" / name)
    assert _checkpoints(tmp_path).latest() == complete
    assert manager.find(tmp_path, "last") == complete


def test_find_takes_the_best_unless_asked_for_the_last(tmp_path):
    best, last = add(tmp_path, 4), add(tmp_path, 9)
    mark_best(tmp_path, 4)
    assert manager.find(tmp_path) == best
    assert manager.find(str(tmp_path), "last") == last
    assert manager.find(last) == last


def test_find_takes_the_last_where_the_best_is_gone(tmp_path):
    last = add(tmp_path, 9)
    mark_best(tmp_path, 4)
    assert manager.find(tmp_path) == last


def test_find_follows_the_options_in_a_run_folder(tmp_path):
    elsewhere = add(tmp_path / "elsewhere", 4)
    run = tmp_path / "run"
    run.mkdir()
    config = {"train": {"checkpoint_dir": str(tmp_path / "elsewhere")}}
    (run / "run_config.json").write_text(json.dumps(config))
    assert manager.find(run) == elsewhere
    (run / "run_config.json").write_text(json.dumps({"train": {}}))  # of a version without the option
    assert manager.find(add(run, 7).parents[1]).name == "step_00000007"


@pytest.mark.parametrize("kind", ["missing", "empty", "incomplete"])
def test_find_says_what_it_looked_for(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "empty":
        folder.mkdir()
    if kind == "incomplete":
        add(folder, 3, is_complete=False)
    with pytest.raises(ValueError, match="neither a run folder with a finished checkpoint nor a checkpoint") as error:
        manager.find(folder)
    assert str(folder) in str(error.value)


def test_state_survives_its_file(tmp_path):
    folder = add(tmp_path, 3)
    assert manager.read_state(folder).metrics == STATE.metrics
    assert manager.read_state(folder) == STATE


@pytest.mark.parametrize("text", ["", "{", '{"step": 3}', '{"steps": 3}', "[]"])
def test_broken_state_is_named(tmp_path, text):
    folder = add(tmp_path, 3)
    (folder / manager.STATE_NAME).write_text(text)
    with pytest.raises(ValueError, match="cannot be read as a run state") as error:
        manager.read_state(folder)
    assert str(folder / manager.STATE_NAME) in str(error.value)


def _edit(folder, **fields) -> None:
    """Changes the state of a checkpoint, and its checksum with it."""
    path = folder / manager.STATE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    sums = integrity.read_checksums(folder)
    files = sums.files | {manager.STATE_NAME: integrity.sum_of(path.read_bytes())}
    (folder / integrity.CHECKSUMS_NAME).write_bytes(dataclasses.replace(sums, files=files).to_json())


def test_a_state_of_a_newer_version_is_no_damage(tmp_path):
    """Else an older program would train the steps of the newest checkpoint again, and set it aside."""
    add(tmp_path, 2)
    newest = add(tmp_path, 4)
    _edit(newest, colour="red")
    with pytest.raises(OtherVersion, match=r"written by a newer version \(unknown field 'colour'\)") as error:
        manager.newest_intact(tmp_path / "checkpoints")
    assert str(newest / manager.STATE_NAME) in str(error.value)


_RUN = {"stage": "pretrain", "data_dir": "data", "output_dir": "run"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"run_config": _RUN | {"colour": "red"}}, "newer version (unknown option RunConfig.colour)"),
        ({"run_config": _RUN | {"model": {"depth": 3}}}, "newer version (unknown option ModelConfig.depth)"),
        (
            {"run_config": _RUN | {"model": {"head_hidden": 4}}},
            "older version, with options that are gone (ModelConfig.h",
        ),
        (
            {"run_config": _RUN, "progress": {"best_step": 3, "mood": 1}},
            "newer version (unknown field 'progress.mood')",
        ),
    ],
    ids=str,
)
def test_options_of_another_version_are_named_with_what_to_do(tmp_path, fields, words):
    folder = add(tmp_path, 3)
    _edit(folder, **fields)
    with pytest.raises(OtherVersion) as error:
        read_run(folder)
    message = str(error.value)
    assert f"{folder / manager.STATE_NAME} was written by a" in message and words in message, message
    assert "use that version (environment.json" in message


def test_find_says_which_checkpoint_stands_for_the_best_one_that_is_gone(tmp_path, caplog):
    for step in (2, 4, 6):
        add(tmp_path, step, best_step=min(step, 4))
    assert manager.find(tmp_path) == tmp_path / "checkpoints/step_00000004" and not caplog.records
    shutil.rmtree(tmp_path / "checkpoints/step_00000004")
    assert manager.find(tmp_path, "last").name == "step_00000006" and not caplog.records
    assert manager.find(tmp_path).name == "step_00000006"
    [message] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "step_00000004 was the best checkpoint" in message and "taking step_00000006" in message


def test_find_before_the_first_validation_takes_the_newest_without_a_warning(tmp_path, caplog):
    add(tmp_path, 2, best_step=-1)
    assert manager.find(tmp_path).name == "step_00000002" and not caplog.records


def _flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_newest_intact_falls_back_over_damaged_ones_and_names_their_files(tmp_path, caplog):
    intact, flipped, short = (add(tmp_path, step) for step in (2, 4, 6))
    _flip_a_bit(flipped / "__1_0.distcp")
    (short / "__0_0.distcp").write_bytes(b"")
    assert manager.newest_intact(tmp_path / "checkpoints") == intact
    messages = [record.getMessage() for record in caplog.records if "trying the checkpoint before it" in record.message]
    assert str(short) in messages[0] and "__0_0.distcp has 0 bytes, 17 were written" in messages[0]
    assert str(flipped) in messages[1] and "__1_0.distcp is not what was written" in messages[1]


def test_a_folder_of_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path):
    for step in (2, 4):
        (add(tmp_path, step) / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact") as error:
        manager.newest_intact(tmp_path / "checkpoints")
    assert "step_00000002" in str(error.value) and "step_00000004" in str(error.value)


def test_a_state_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    """Else one rank would go back alone, because its disk did not answer for a moment."""
    add(tmp_path, 2)
    newest = add(tmp_path, 4)
    read = storage.read_json

    def fails_once(path):
        if path == newest / retention.STATE_NAME:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(storage, "read_json", fails_once)
    with pytest.raises(OSError, match="Input/output error"):
        manager.newest_intact(tmp_path / "checkpoints")


def test_all_ranks_take_what_rank_0_has_found(tmp_path, monkeypatch):
    """Here as rank 1, which would find a later one: the run that is looked at goes on."""
    first, later = add(tmp_path, 2, best_step=2), add(tmp_path, 4, best_step=4)
    of_rank_0 = [[first, None], [None, ValueError("nothing there")]]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)

    def broadcast(found, src, group):
        found[:] = of_rank_0.pop(0)

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert manager.find(tmp_path) == later
    assert manager.find_together(tmp_path) == first
    with pytest.raises(ValueError, match="nothing there"):
        manager.find_together(tmp_path)


def test_a_store_that_does_not_answer_is_no_fresh_start_and_nothing_in_it_is_deleted(tmp_path, monkeypatch):
    run = manager.location(f"memory://{tmp_path.name}/run")
    kept = add(run, 2)
    system = fsspec.implementations.memory.MemoryFileSystem
    info = system.info

    def fails_for_the_state(self, path, **more):
        if path.endswith(retention.STATE_NAME):
            raise OSError("reset by peer")
        return info(self, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(system, "info", fails_for_the_state)
        for ask in (lambda: manager.newest_intact(run / "checkpoints"), lambda: _checkpoints(str(run))._prepare(2)):
            with pytest.raises(OSError, match="reset by peer"):
                ask()
    assert manager.newest_intact(run / "checkpoints") == kept


def test_a_checkpoint_of_an_older_version_counts_with_a_warning(tmp_path, caplog):
    old = add(tmp_path, 2, has_checksums=False)
    assert manager.newest_intact(tmp_path / "checkpoints") == old
    assert "saved without checksums" in caplog.text


def test_going_back_sets_later_checkpoints_aside(tmp_path):
    """Else retention would count the damaged ones, and delete what the run saves on its way to them."""
    start, damaged = add(tmp_path, 2, best_step=2), add(tmp_path, 4, best_step=4)
    mark_best(tmp_path, 4)
    checkpoints = _checkpoints(tmp_path)
    checkpoints.go_back_to(start)
    assert checkpoints.latest() == checkpoints.best() == start
    assert json.loads((tmp_path / "checkpoints/best.json").read_text())["step"] == 2
    assert (damaged / retention.DAMAGED_NAME).is_file() and (damaged / integrity.CHECKSUMS_NAME).is_file()
    add(tmp_path, 6, best_step=2)
    assert retention.removable(tmp_path / "checkpoints", 1, 0.0) == []  # for a person to look at


def test_a_newer_version_of_checksums_is_refused(tmp_path):
    folder = add(tmp_path, 2)
    path = folder / integrity.CHECKSUMS_NAME
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(OSError, match="has version 2, this program knows 1"):
        integrity.check(folder)


def test_a_start_from_what_is_unfinished_or_not_the_best_is_doubted(tmp_path):
    first = add(tmp_path, 2, best_step=2)
    last = add(tmp_path, 4, best_step=2)

    def finish(is_finished: bool) -> None:
        state = json.loads((last / "run_state.json").read_text())
        state["progress"]["is_finished"] = is_finished
        (last / "run_state.json").write_text(json.dumps(state))

    finish(False)
    assert len(manager.doubts(last)) == 2 and [*manager.doubts(first)] == [
        f"the run of {first} is not finished: its best checkpoint may become another one"
    ]
    finish(True)
    assert manager.doubts(first) == []
    assert manager.doubts(last) == [f"{last} is not the best checkpoint of its run, which is {first.name}"]
    shutil.copytree(last, tmp_path / "copy")
    assert manager.doubts(tmp_path / "copy") == []
