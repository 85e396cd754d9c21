"""A loss of power at any moment leaves what was there before or what is new, whole: `tests/helpers/power_loss.py`."""

import json

import pytest
import torch
import torch.distributed as dist

from data_pipeline import build, validate
from gpsd_dist.checkpoint import integrity, manager, saving
from gpsd_dist.config import TrainConfig
from gpsd_dist.data import data_versions
from gpsd_dist.disk import writing
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.recorder import JSONL_NAME, Recorder, truncate_jsonl
from gpsd_dist.serving import artefact
from tests.helpers.power_loss import check, recorded
from tests.unit.data_pipeline.test_kills import first_builds
from tests.unit.serving.test_artefact import write


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(output, first: int, last: int) -> None:
    """Steps that log a line each, with a save after every second one."""
    checkpoints = saving.Checkpoints(
        output, Runtime(0, 1, 0, torch.device("cpu")), TrainConfig(keep_last=1, async_checkpoints=False)
    )
    recorder = Recorder(output, 0, resume_step=first - 1 or None)
    checkpoints.before_commit = recorder.sync
    with checkpoints:
        for step in range(first, last + 1):
            recorder.record("train/loss", float(step))
            recorder.log(step, 0.0)
            if step % 2 == 0:
                state = manager.RunState(step, {}, {"best_step": step}, {"click/auc": step / 10}, {}, {}, 1)
                checkpoints.save({"dense": {"w": torch.full((3,), float(step))}}, state)
    recorder.close()


def newest_step(output) -> int:
    """Step of the newest checkpoint, which must be whole, and have the metrics of all its steps beside it."""
    found = manager.newest_intact(output / "checkpoints")
    step = 0 if found is None else manager.read_state(found).step
    truncate_jsonl(output / JSONL_NAME, step or -1)
    lines = (output / JSONL_NAME).read_text().splitlines() if (output / JSONL_NAME).exists() else []
    assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    if found is not None:
        integrity.check(found)
        assert manager.best_step(output / "checkpoints") == step
    return step


def test_a_checkpoint_is_whole_and_has_its_metrics(tmp_path, monkeypatch, group):
    output = tmp_path / "run"
    output.mkdir()
    train(output, 1, 2)
    with recorded(output, monkeypatch) as recording:
        train(output, 3, 6)
    steps = check(recording, tmp_path / "left", newest_step, seeds=range(2), every=2)
    assert set(steps) == {2, 4, 6} and steps[-1] == 6  # with the last sync, everything is on disk


def test_the_first_checkpoint_of_a_run_is_on_disk_when_the_save_is_over(tmp_path, monkeypatch, group):
    output = tmp_path / "run"
    output.mkdir()
    with recorded(output, monkeypatch) as recording:
        train(output, 1, 2)
    steps = check(recording, tmp_path / "left", newest_step)
    assert set(steps) == {0, 2} and steps[-5:] == [2] * 5


def test_a_data_set_is_the_version_of_before_or_the_new_one(tmp_path, monkeypatch):
    target, arguments = first_builds(tmp_path, "append")
    before = data_versions.current(target).name
    with recorded(target, monkeypatch) as recording:
        assert build.main(arguments) == 0
    after = data_versions.current(target).name

    def look(folder):
        validate.check(folder)
        return data_versions.current(folder).name

    names = check(recording, tmp_path / "left", look, seeds=range(1), every=4)
    assert set(names) == {before, after} and names[0] == before
    assert before != after


def test_an_artefact_is_the_version_of_before_or_the_new_one(tmp_path, monkeypatch):
    root = tmp_path / "ctr"
    first = write(root)
    with recorded(root, monkeypatch) as recording:
        second = write(root, "second", (b"frozen", b"new"))

    def look(folder):
        opened = artefact.open_version(folder)
        opened.check_hashes()
        return opened.version

    names = check(recording, tmp_path / "left", look)
    assert set(names) == {first, second} and set(names[-5:]) == {second}


def test_a_write_without_syncs_is_found(tmp_path, monkeypatch):
    """The control: the same with a rename that nothing was synced for."""
    root = tmp_path / "ctr"
    root.mkdir()
    writing.write(root / "a", b"old")

    def unsynced():
        (root / "b").write_bytes(b"new")
        (root / "b").replace(root / "a")

    with recorded(root, monkeypatch) as recording:
        unsynced()
    assert b"" in check(recording, tmp_path / "left", lambda folder: (folder / "a").read_bytes())
    with recorded(root, monkeypatch) as recording:
        writing.write(root / "a", b"newer")
    assert set(check(recording, tmp_path / "left", lambda folder: (folder / "a").read_bytes())) == {b"new", b"newer"}
