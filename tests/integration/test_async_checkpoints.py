"""Saving in the background: training goes on, the copy is not torn, one save at a time, errors reach the trainer."""

import dataclasses
import threading

import pytest
import torch

from gpsd_dist.checkpoint import files, integrity, loading, manager, saving
from gpsd_dist.config import TrainConfig
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import cpu_runtime, differing, read_checkpoint, step_folder, tiny_run, train_losses

pytestmark = pytest.mark.timeout(420)

GATE_S = 120.0


def _state(step: int, best_step: int = 0) -> manager.RunState:
    return manager.RunState(step, {}, {"best_step": best_step or step}, {}, {}, {}, 1)


def _tensors(value: float) -> loading.Tensors:
    return {"table": {"item": torch.full((50, 4), value)}}


@pytest.fixture
def gate(monkeypatch):
    """A writer that writes only once the gate is open; says whether it ever gave up waiting."""
    opened = threading.Event()
    opened.gave_up = False
    original = files.Writer.write_data

    def write_data(self, plan, planner):
        opened.gave_up |= not opened.wait(GATE_S)
        return original(self, plan, planner)

    monkeypatch.setattr(files.Writer, "write_data", write_data)
    yield opened
    opened.set()


def test_training_goes_on_while_a_checkpoint_is_written(data_dir, tmp_path, one_rank, gate):
    """Steps 3 and 4 run while step 2 waits to be written; what is written is step 2, and the run is the same."""
    train = {"save_interval_steps": 2, "max_steps": 5, "keep_last": 9}
    waiting = Trainer(tiny_run("finetune", data_dir, tmp_path / "async", train=train), one_rank)
    original = waiting.metrics.record_step

    def record_step(done):
        original(done)
        if waiting.step == 4:  # its save waits for the one of step 2
            assert not step_folder(tmp_path / "async", 2).exists()
            gate.set()

    waiting.metrics.record_step = record_step
    waiting.train()
    assert not gate.gave_up
    blocking = tiny_run("finetune", data_dir, tmp_path / "sync", train=train | {"async_checkpoints": False})
    Trainer(blocking, one_rank).train()
    for step in (2, 4, 5):
        one, two = (read_checkpoint(step_folder(tmp_path / name, step)) for name in ("async", "sync"))
        assert not differing(one, two), step
    assert train_losses(tmp_path / "async") == train_losses(tmp_path / "sync")


def test_at_most_one_save_is_under_way(tmp_path, one_rank, gate):
    with saving.Checkpoints(tmp_path, one_rank, TrainConfig()) as checkpoints:
        checkpoints.save(_tensors(1.0), _state(1))
        stall_of_copy_s = checkpoints.stall_s
        assert not step_folder(tmp_path, 1).exists()
        threading.Timer(0.3, gate.set).start()
        checkpoints.save(_tensors(2.0), _state(2))
        assert step_folder(tmp_path, 1).is_dir() and checkpoints.stall_s > stall_of_copy_s
    assert step_folder(tmp_path, 2).is_dir()  # leaving the block waits
    assert bool((read_checkpoint(step_folder(tmp_path, 1))["table.item"] == 1.0).all())


def test_latest_counts_the_save_under_way(tmp_path, one_rank, gate):
    checkpoints = saving.Checkpoints(tmp_path, one_rank, TrainConfig())
    checkpoints.save(_tensors(1.0), _state(1))
    threading.Timer(0.2, gate.set).start()
    assert checkpoints.latest() == step_folder(tmp_path, 1)


def _full_disk(self, plan, planner):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("is_async", [True, False])
def test_a_write_error_ends_the_run_with_rank_and_path(data_dir, tmp_path, one_rank, monkeypatch, is_async):
    monkeypatch.setattr(files.Writer, "write_data", _full_disk)
    train = {"save_interval_steps": 2, "max_steps": 5, "async_checkpoints": is_async}
    trainer = Trainer(tiny_run("finetune", data_dir, tmp_path, train=train), one_rank)
    with pytest.raises(OSError, match=r"step_00000002 was not written: rank 0: .*No space left on device") as error:
        trainer.train()
    assert str(tmp_path) in str(error.value)
    assert trainer.step == (4 if is_async else 2)  # at the next save
    assert manager.newest_intact(tmp_path / "checkpoints") is None


def test_an_error_of_the_last_save_is_not_lost(tmp_path, one_rank, monkeypatch):
    monkeypatch.setattr(files.Writer, "write_data", _full_disk)
    with pytest.raises(OSError, match="step_00000001 was not written"):
        with saving.Checkpoints(tmp_path, one_rank, TrainConfig()) as checkpoints:
            checkpoints.save(_tensors(1.0), _state(1))


def test_an_error_of_training_is_shown_and_the_save_finished(tmp_path, one_rank, gate):
    with pytest.raises(ValueError, match="the loss is not finite"):
        with saving.Checkpoints(tmp_path, one_rank, TrainConfig()) as checkpoints:
            checkpoints.save(_tensors(1.0), _state(1))
            threading.Timer(0.2, gate.set).start()
            raise ValueError("the loss is not finite")
    assert manager.find(tmp_path) == step_folder(tmp_path, 1)


def test_a_step_saved_again_replaces_the_checkpoint_once_it_is_complete(tmp_path, one_rank, monkeypatch):
    train = TrainConfig(async_checkpoints=False)
    checkpoints = saving.Checkpoints(tmp_path, one_rank, train)
    checkpoints.save(_tensors(1.0), _state(1))
    with monkeypatch.context() as patch:
        patch.setattr(files.Writer, "write_data", _full_disk)
        with pytest.raises(OSError, match="was not written"):
            checkpoints.save(_tensors(2.0), _state(1))
    assert bool((read_checkpoint(manager.find(tmp_path))["table.item"] == 1.0).all())
    checkpoints.save(_tensors(3.0), _state(1))
    assert bool((read_checkpoint(manager.find(tmp_path))["table.item"] == 3.0).all())
    assert len(list((tmp_path / "checkpoints").glob("*step_*"))) == 1


def _fail_on_rank_1(rank: int, world_size: int, output_dir) -> list[str]:
    """Two saves; writing the first fails on rank 1, then committing fails on rank 0."""
    messages = []
    original = files.Writer.write_data
    if rank == 1:
        files.Writer.write_data = _full_disk
    checkpoints = saving.Checkpoints(output_dir, cpu_runtime(rank, world_size), TrainConfig())
    checkpoints.save(_tensors(1.0), dataclasses.replace(_state(1), world_size=2))
    try:
        checkpoints.wait()
    except OSError as error:
        messages.append(str(error))
    files.Writer.write_data = original

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    checkpoints._commit = refuse
    checkpoints.save(_tensors(2.0), _state(2))
    try:
        checkpoints.wait()
    except OSError as error:
        messages.append(str(error))
    del checkpoints._commit
    checkpoints.save(_tensors(3.0), _state(3))  # the object is good for another try
    checkpoints.wait()
    integrity.check(step_folder(output_dir, 3))
    return messages


def test_an_error_on_one_rank_is_known_to_all(tmp_path):
    results = run_distributed(_fail_on_rank_1, 2, tmp_path, tmp_path / "run", timeout_s=300)
    assert results[0] == results[1]
    assert "step_00000001 was not written: rank 1: [Errno 28] No space left on device" in results[0][0]
    assert "step_00000002 was not written: rank 0: [Errno 30] Read-only file system" in results[0][1]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000003"]
