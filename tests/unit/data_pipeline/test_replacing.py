"""A version is added as a whole or not at all: links, mounts, stops, full disks, and which old versions stay."""

import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline import build, publish
from gpsd_dist import schema
from gpsd_dist.data import data_versions, decoded_cache
from tests.assets.cases import logs
from tests.unit.data_pipeline.conftest import run
from tests.unit.test_imports import REPO_ROOT


@pytest.fixture
def raw(tmp_path) -> pathlib.Path:
    return logs.every_event_twice(tmp_path / "raw")


def plain(raw: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A data set of the time before there were versions."""
    assert run(*arguments(raw, tmp_path / "new")) == 0
    shutil.copytree(data_versions.current(tmp_path / "new"), tmp_path / "out")
    shutil.rmtree(tmp_path / "new")
    return tmp_path / "out"


def arguments(raw: pathlib.Path, out: pathlib.Path) -> list[str]:
    return ["--source", "generic", "--raw_dir", str(raw), "--out_dir", str(out), "--force"]


def test_the_folder_behind_a_link_is_replaced(raw, tmp_path):
    (tmp_path / "big" / "mine").mkdir(parents=True)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").symlink_to("../big/mine")
    assert run(*arguments(raw, tmp_path / "small" / "mine")) == 0
    assert os.listdir(tmp_path / "small") == ["mine"] and (tmp_path / "small" / "mine").is_symlink()
    assert os.listdir(tmp_path / "big") == ["mine"] and (tmp_path / "big" / "mine" / "current.json").is_file()


def test_a_folder_that_cannot_be_written_is_refused_at_once(raw, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(publish.os, "open", refuse)
    assert run(*arguments(raw, tmp_path / "out")) == 2
    assert "nothing can be written there" in capsys.readouterr().err


def test_a_mounted_volume_and_its_hidden_files_are_no_obstacle(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda self: True)
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    (tmp_path / "out" / ".snapshot").touch()
    assert run(*arguments(raw, tmp_path / "out")) == 0
    assert set(os.listdir(tmp_path / "out")) == {".snapshot", "current.json", "lost+found", "versions"}
    assert set(os.listdir(tmp_path)) == {"raw", "out"}


def test_a_data_set_that_an_old_build_moved_away_is_moved_back(raw, tmp_path, capsys):
    out = plain(raw, tmp_path)
    out.rename(tmp_path / ".out.old-4711")
    assert run(*arguments(raw, out)[:-1]) == 0
    printed = capsys.readouterr().out
    assert "moved back" in printed and "up to date" in printed
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"]


def test_sigterm_leaves_nothing_behind(tmp_path):
    rows = [(n % 9_000, n % 500, 1_700_000_000 + n) for n in range(400_000)]
    raw = logs.write(tmp_path / "raw", logs.HISTORY, {"log.csv": logs.lines(rows)})
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "data_pipeline.build", *arguments(raw, tmp_path / "out" / "data")]
    with subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "out").glob("data/versions/.building")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == build.STOPPED
    assert error.strip().splitlines()[-1] == "error: stopped by SIGTERM; no data set was changed"
    assert os.listdir(tmp_path / "out") == []


class _StopsWhenDeleted:
    """Gets SIGTERM where Python drops what a handler raises: in `__del__`."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_whose_exception_was_lost_stops_the_build(raw, tmp_path, monkeypatch, capsys):
    def sync_and_be_stopped(path):
        _StopsWhenDeleted()

    monkeypatch.setattr(publish, "sync", sync_and_be_stopped)
    assert run(*arguments(raw, tmp_path / "out")) == build.STOPPED
    assert "no data set was changed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "current.json").exists()


def test_two_builds_of_one_folder_are_refused(raw, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    lock = os.open(tmp_path / "out" / publish.LOCK_NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert run(*arguments(raw, tmp_path / "out")) == 2
    assert "another build is at work" in capsys.readouterr().err
    os.close(lock)
    assert run(*arguments(raw, tmp_path / "out")) == 0


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        (OSError(28, "No space left on device"), build.NO_FILE_ACCESS, "No space left on device"),
        (OSError(30, "Read-only file system"), build.NO_FILE_ACCESS, "Read-only file system"),
        (MemoryError("realloc of size 4096 failed"), build.FAILED, "out of memory (realloc of size 4096 failed)"),
    ],
)
def test_a_full_disk_and_a_full_memory_are_one_line(raw, tmp_path, monkeypatch, capsys, failure, status, words):
    def fail(*_):
        raise failure

    monkeypatch.setattr(schema, "write_manifest", fail)
    assert run(*arguments(raw, tmp_path / "out")) == status
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_engine_out_of_memory_is_one_line(raw, tmp_path, capsys):
    rows = [(n % 60, n % 30_000, 1_700_000_000 + n) for n in range(120_000)]
    logs.write(raw, logs.HISTORY, {"log.csv": logs.lines(rows)})
    assert run(*arguments(raw, tmp_path / "out"), "--memory_limit", "10MB") == build.FAILED
    error = capsys.readouterr().err
    assert "--memory_limit" in error and error.count("\n") == 1


def versions(out: pathlib.Path) -> list[str]:
    return sorted(path.name[:4] for path in (out / "versions").iterdir())


def test_the_newest_versions_stay(raw, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(3):
        assert run(*arguments(raw, out)) == 0
    assert versions(out) == ["0002", "0003"]
    assert run(*arguments(raw, out), "--keep_versions", "1") == 0
    assert versions(out) == ["0004"] and "version 0003-" in capsys.readouterr().out
    assert run(*arguments(raw, out), "--keep_versions", "0") == 2


def test_a_version_that_is_read_stays_until_its_reader_has_been_dead_for_a_day(raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*arguments(raw, out)) == 0
    code = (
        "import sys; from gpsd_dist.data import data_versions as d; d.opened(sys.argv[1]); print('read', flush=True); "
    )
    code += "input(); import os; os._exit(1) if sys.argv[2] == 'dies' else None"
    for ending in ("ends", "dies"):
        command = [sys.executable, "-c", code, str(out), ending]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=REPO_ROOT, **pipes) as reader:
            assert reader.stdout.readline() == "read\n"
            read = data_versions.current(out)
            assert run(*arguments(raw, out), "--keep_versions", "1") == 0
            assert read.is_dir() and f"version {read.name} stays: in use by " in capsys.readouterr().out
            reader.communicate("\n")
        marks = list((out / "in_use").iterdir())
        assert len(marks) == (ending == "dies")  # a process that is gone cannot remove it
        assert run(*arguments(raw, out), "--keep_versions", "1") == 0
        assert read.is_dir() == (ending == "dies")
    old_s = time.time() - 1.01 * data_versions.DEAD_AFTER_S
    os.utime(marks[0], (old_s, old_s))
    assert run(*arguments(raw, out), "--keep_versions", "1") == 0
    assert versions(out) == [data_versions.current(out).name[:4]] and not list((out / "in_use").iterdir())


def test_a_data_set_of_before_stays_one_version_of_the_folder(raw, tmp_path, capsys):
    out = plain(raw, tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(*arguments(raw, out)[:-1]) == 0 and "up to date" in capsys.readouterr().out
    assert run(*arguments(raw, out)) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert data_versions.current(out).parent == out / "versions"
    (out / "notes.txt").write_text("mine")
    (out / decoded_cache.FOLDER_NAME).mkdir()
    assert run(*arguments(raw, out)) == 0
    assert set(os.listdir(out)) == {"current.json", "versions", "notes.txt"}


def test_links_are_copies_where_a_file_system_has_none(raw, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "from" / "train").mkdir(parents=True)
    (tmp_path / "from" / "train" / "a").write_text("rows")
    monkeypatch.setattr(publish.os, "link", refuse)
    publish.link(("train/a",), tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "train" / "a").read_text() == "rows"


def test_a_failure_at_the_last_moment_changes_nothing(raw, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(*arguments(raw, out)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "write_json", full)
    assert run(*arguments(raw, out)) == build.NO_FILE_ACCESS
    assert "No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def published(out: pathlib.Path, keep_versions: int = 2) -> pathlib.Path:
    """Publishes a version that holds a manifest alone."""
    with publish.locked(out), publish.version(out, keep_versions) as aside:
        (aside / "manifest.json").write_text("{}")
    return data_versions.current(out)


def test_versions_survive_the_loss_of_current_json(tmp_path):
    first, second = published(tmp_path / "out"), published(tmp_path / "out")
    (tmp_path / "out" / "current.json").unlink()
    with publish.locked(tmp_path / "out"):
        assert data_versions.published(tmp_path / "out") == (second.name, (first.name, second.name))
    assert published(tmp_path / "out").name.startswith("0003-")


def test_a_number_is_not_given_twice(tmp_path):
    first, last = published(tmp_path), published(tmp_path)
    (tmp_path / "in_use").mkdir()
    (tmp_path / "in_use" / f"{last.name}.host.1.aa").touch()
    (tmp_path / "current.json").write_text(f'{{"version": "{first.name}", "published": ["{first.name}"]}}')
    assert published(tmp_path).name.startswith("0003-") and last.is_dir()


@pytest.mark.parametrize("inside", ["", "more"])
def test_no_data_set_is_built_in_a_version(tmp_path, inside):
    with pytest.raises(ValueError, match=f"in. a version of the data set {tmp_path}"):
        published(published(tmp_path) / inside)


def test_a_folder_of_versions_of_something_else_is_not_touched(tmp_path):
    mine = tmp_path / "versions" / "2024-deadbeef"
    mine.mkdir(parents=True)
    with pytest.raises(ValueError, match="is not a data set"):
        published(tmp_path)
    (tmp_path / "current.json").write_text('{"version": "0001-aaaaaaaa", "published": ["0001-aaaaaaaa"]}')
    published(tmp_path)
    assert mine.is_dir()


def test_what_stands_where_a_build_writes_is_removed_and_not_what_it_points_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "out" / "versions").mkdir(parents=True)
    building = tmp_path / "out" / "versions" / ".building"
    for stands in (building.touch, lambda: building.symlink_to(tmp_path / "mine")):
        stands()
        assert published(tmp_path / "out").is_dir() and (tmp_path / "mine").is_dir()


def test_a_reader_that_comes_while_a_version_is_deleted_keeps_it(tmp_path, monkeypatch):
    """It marks the version after the build has looked for marks, and before it is gone: the reader still finds it."""
    first = published(tmp_path)
    replace = publish.write_json

    def read_meanwhile(path, content):
        (tmp_path / "in_use").mkdir()
        (tmp_path / "in_use" / f"{first.name}.host.1.aa").touch()
        replace(path, content)

    monkeypatch.setattr(publish, "write_json", read_meanwhile)
    second = published(tmp_path, keep_versions=1)
    assert first.is_dir() and second.is_dir()


def test_files_of_somebody_else_stay_where_an_old_data_set_is_deleted(raw, tmp_path):
    out = plain(raw, tmp_path)
    (out / "train" / "mine.txt").touch()
    assert run(*arguments(raw, out), "--keep_versions", "1") == 0
    assert sorted(os.listdir(out)) == ["current.json", "train", "versions"]
    assert os.listdir(out / "train") == ["mine.txt"]
