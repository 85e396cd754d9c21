"""A data set is replaced as a whole or not at all: links, mounts, kills, stops, and what dead builds leave."""

import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline import build, write
from gpsd_dist import schema
from tests.assets.cases import logs
from tests.unit.data_pipeline.conftest import run
from tests.unit.test_imports import REPO_ROOT

KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
left, rename = [{number}], pathlib.Path.rename
def counted(self, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = counted
from data_pipeline import build
sys.exit(build.main(sys.argv[1:]))
"""


@pytest.fixture
def raw(tmp_path) -> pathlib.Path:
    return logs.every_event_twice(tmp_path / "raw")


def arguments(raw: pathlib.Path, out: pathlib.Path) -> list[str]:
    return ["--source", "generic", "--raw_dir", str(raw), "--out_dir", str(out), "--force"]


def kill_before_rename(number: int, raw: pathlib.Path, out: pathlib.Path) -> None:
    code = KILLED.format(root=str(REPO_ROOT), number=number)
    ended = subprocess.run([sys.executable, "-c", code, *arguments(raw, out)], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL


def test_the_folder_behind_a_link_is_replaced(raw, tmp_path):
    (tmp_path / "big" / "mine").mkdir(parents=True)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").symlink_to("../big/mine")
    assert run(*arguments(raw, tmp_path / "small" / "mine")) == 0
    assert os.listdir(tmp_path / "small") == ["mine"] and (tmp_path / "small" / "mine").is_symlink()
    assert os.listdir(tmp_path / "big") == ["mine"] and (tmp_path / "big" / "mine" / "manifest.json").is_file()


def test_a_mounted_volume_is_refused_at_once(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda self: True)
    assert run(*arguments(raw, tmp_path / "out")) == 2
    assert "mounted volume" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_at_once(raw, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(write.os, "open", refuse)
    assert run(*arguments(raw, tmp_path / "out")) == 2
    assert "nothing can be written in" in capsys.readouterr().err


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_build_is_put_right_by_the_next(raw, tmp_path, capsys, number):
    out = tmp_path / "out"
    assert run(*arguments(raw, out)) == 0
    kill_before_rename(number, raw, out)
    capsys.readouterr()
    assert run(*arguments(raw, out)[:-1]) == 0  # nothing changed: the data set of before is there, and is enough
    printed = capsys.readouterr().out
    assert ("moved back" in printed) == (number == 2) and "up to date" in printed and "removed" in printed
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"]


def test_sigterm_leaves_nothing_behind(tmp_path):
    rows = [(n % 9_000, n % 500, 1_700_000_000 + n) for n in range(400_000)]
    raw = logs.write(tmp_path / "raw", logs.HISTORY, {"log.csv": logs.lines(rows)})
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "data_pipeline.build", *arguments(raw, tmp_path / "out" / "data")]
    with subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "out").glob(".data.building-*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == build.STOPPED
    assert error.strip().splitlines()[-1] == "error: stopped by SIGTERM; no data set was changed"
    assert os.listdir(tmp_path / "out") == []


def test_two_builds_of_one_folder_are_refused(raw, tmp_path, capsys):
    lock = os.open(tmp_path / ".out.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert run(*arguments(raw, tmp_path / "out")) == 2
    assert "another build is at work" in capsys.readouterr().err
    os.close(lock)
    assert run(*arguments(raw, tmp_path / "out")) == 0


def test_a_disk_that_is_full_is_one_line(raw, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(schema, "write_manifest", full)
    assert run(*arguments(raw, tmp_path / "out")) == build.NO_FILE_ACCESS
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_engine_out_of_memory_is_one_line(raw, tmp_path, capsys):
    rows = [(n % 60, n % 30_000, 1_700_000_000 + n) for n in range(120_000)]
    logs.write(raw, logs.HISTORY, {"log.csv": logs.lines(rows)})
    assert run(*arguments(raw, tmp_path / "out"), "--memory_limit", "10MB") == build.FAILED
    error = capsys.readouterr().err
    assert "--memory_limit" in error and error.count("\n") == 1
