"""Who holds an output folder, for how long, and what others are told."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from gpsd_dist.checkpoint import output_lock


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_place_for_checkpoints_that_cannot_be_written_is_known_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"file/checkpoints cannot be written, so nothing was trained: .*Not a directory"):
        with output_lock.held(tmp_path / "run", checkpoints=tmp_path / "file" / "checkpoints"):
            pytest.fail("it may train")
    with output_lock.held(tmp_path / "run", checkpoints=tmp_path / "run" / "checkpoints"):
        assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / run`."""
    code = (
        "import torch.distributed as dist, sys, time\n"
        "from gpsd_dist.checkpoint import output_lock\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "with output_lock.held(sys.argv[1]):\n"
        "    print('held', flush=True)\n    time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_job_is_refused_with_the_name_of_the_first(tmp_path, holder):
    with pytest.raises(OSError, match="in use by another job") as error:
        with output_lock.held(tmp_path / "run", wait_s=0.3):
            raise AssertionError("two jobs hold one folder")
    text = str(error.value)
    assert f"host {socket.gethostname()}, process {holder.pid}, started 2" in text and "OUTPUT_DIR" in text


def test_killed_holder_does_not_block(tmp_path, holder):
    holder.kill()
    with output_lock.held(tmp_path / "run", wait_s=5.0):
        facts = json.loads((tmp_path / "run" / output_lock.LOCK_NAME).read_text())
        assert facts["pid"] == os.getpid()


def test_holder_that_is_leaving_is_waited_for(tmp_path, holder):
    subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {holder.pid}"])
    with output_lock.held(tmp_path / "run", wait_s=20.0):
        assert holder.wait(timeout=0.1) == -signal.SIGKILL  # no sooner than the holder had gone


def test_folder_is_free_after_the_block_and_after_an_error(tmp_path):
    with pytest.raises(RuntimeError):
        with output_lock.held(tmp_path):
            raise RuntimeError
    with output_lock.held(tmp_path, wait_s=0.0):
        pass
    assert (tmp_path / output_lock.LOCK_NAME).read_bytes() == b""


def test_folder_that_cannot_be_written_is_an_error_before_anything_else(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written, so nothing was trained"):
        with output_lock.held(tmp_path / "file" / "run"):
            raise AssertionError("the folder cannot exist")


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(output_lock.fcntl, "flock", flock)
    with output_lock.held(tmp_path):
        pass
    assert any("no locks" in record.getMessage() for record in caplog.records)
