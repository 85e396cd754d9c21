"""Which version of a data set a reader opens, and how it says that it is reading."""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import shutil
import threading
import time

import pytest

from gpsd_dist import schema
from gpsd_dist.data import data_versions
from gpsd_dist.disk import reading
from tests.helpers.versions import publish
from tests.unit.test_schema import MANIFEST


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """Two versions, of sources "first" and "second"; the second is the current one."""
    for source in ("first", "second"):
        (tmp_path / source).mkdir()
        schema.write_manifest(dataclasses.replace(MANIFEST, source=source), tmp_path / source)
    publish(tmp_path / "out", tmp_path / "first", tmp_path / "second")
    yield tmp_path / "out"
    data_versions.release()


def wanted(source: str, first: str = "") -> data_versions.Wanted:
    return data_versions.Wanted(lambda manifest: manifest.source == source, first, f"is {source}")


def test_the_current_version_is_read_and_named(root, caplog):
    with caplog.at_level(logging.INFO, "gpsd_dist"):
        folder = data_versions.opened(str(root))
    assert schema.read_manifest(folder).source == "second"
    assert caplog.messages == [f"data: version {folder.name} of {root}"]
    assert data_versions.root_of(folder) == root and data_versions.name_of(folder) == folder.name


def test_a_folder_without_versions_is_itself(tmp_path):
    schema.write_manifest(MANIFEST, tmp_path)
    assert data_versions.opened(tmp_path) == tmp_path == data_versions.root_of(tmp_path)
    assert data_versions.find(tmp_path, wanted("nothing like it")) == tmp_path
    assert os.listdir(tmp_path) == [schema.MANIFEST_NAME]
    assert data_versions.current(tmp_path / "nothing") == tmp_path / "nothing"


def test_a_version_can_be_named(root):
    first = sorted((root / "versions").iterdir())[0]
    assert data_versions.opened(first) == first


def test_the_version_that_fits_is_found(root):
    first, second = sorted((root / "versions").iterdir())
    assert data_versions.find(root, wanted("first")) == first
    assert data_versions.find(second, wanted("first")) == first
    shutil.copytree(first, first.with_name("0003-00000003"))
    assert data_versions.find(root, wanted("first", first.name)) == first
    assert data_versions.find(root, wanted("first")).name == "0003-00000003"  # the newest of several
    for folder in (first, first.with_name("0003-00000003")):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=rf"no version of {root} is first; it has {second.name}\. If a later build"):
        data_versions.find(first, wanted("first"))


def test_a_data_set_of_before_is_one_of_the_versions(root):
    schema.write_manifest(dataclasses.replace(MANIFEST, source="of before"), root)
    assert data_versions.find(root, wanted("of before", data_versions.ROOT)) == root
    assert data_versions.opened(root).name.startswith("0002")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", "[" * 9999, '{"version": "../etc", "published": ["../etc"]}', '{"version": ["0001-00000001"]}',
     '{"version": "0001-00000001", "published": []}', '{"version": "0001-00000001", "published": 3}', "\udcff"],
)  # fmt: skip
def test_a_broken_current_json_is_named(root, text):
    (root / "current.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"current\.json holds .*, expected the names of versions"):
        data_versions.opened(root)


def test_a_reader_is_known_while_it_lives(root, monkeypatch):
    folder = data_versions.opened(root)
    data_versions.opened(root)
    [mark] = (root / "in_use").iterdir()
    assert mark.name.startswith(f"{folder.name}.") and f".{os.getpid()}." in mark.name
    now_s = mark.stat().st_mtime
    assert data_versions.users(root, folder.name, now_s + data_versions.DEAD_AFTER_S - 1)
    assert data_versions.users(root, "0001-00000001", now_s) == []
    old_s = now_s - data_versions.DEAD_AFTER_S
    os.utime(mark, (old_s, old_s))
    monkeypatch.setattr(data_versions, "TOUCH_EVERY_S", 0.001)
    threading.Thread(target=data_versions._keep_alive, daemon=True).start()
    end_s = time.monotonic() + 20
    while mark.stat().st_mtime == old_s and time.monotonic() < end_s:
        time.sleep(0.01)
    assert data_versions.users(root, folder.name, now_s) == [mark.name.removeprefix(f"{folder.name}.")]
    monkeypatch.undo()
    data_versions.release()
    assert not mark.exists()


def test_a_reader_that_may_not_write_reads_all_the_same(root, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with caplog.at_level(logging.INFO, "gpsd_dist"):
        assert data_versions.opened(root).is_dir()
    assert "cannot be marked as in use (Read-only file system)" in caplog.text


def test_a_file_that_was_replaced_on_a_server_is_read_again(root, monkeypatch):
    first, opened = [True], reading.open_read

    def stale(path):
        if first.pop() if first else False:
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path)

    monkeypatch.setattr(reading, "open_read", stale)
    assert data_versions.current(root).name == "0002-00000002" and not first


def test_reading_the_folder_of_versions_as_a_version_is_an_error(root):
    with pytest.raises(ValueError, match="has versions of a data set, read that of"):
        schema.read_manifest(root)
    assert json.loads((root / "current.json").read_text())["version"] == "0002-00000002"


def test_a_version_behind_a_link_or_a_dot_is_marked(root, tmp_path, monkeypatch):
    first = sorted((root / "versions").iterdir())[0]
    (tmp_path / "latest").symlink_to(first)
    monkeypatch.chdir(first)
    for named in (tmp_path / "latest", pathlib.Path(".")):
        assert data_versions.opened(named) == first
        assert data_versions.users(root, first.name, time.time())
        data_versions.release()


def test_a_pipe_as_current_json_is_not_waited_for(root):
    (root / "current.json").unlink()
    os.mkfifo(root / "current.json")
    with pytest.raises(OSError, match="is a pipe"):
        data_versions.opened(root)


def test_a_reader_that_lost_a_race_with_a_build_takes_the_next_version(root, monkeypatch):
    first, second = sorted((root / "versions").iterdir())
    found = [first, second]
    monkeypatch.setattr(data_versions, "find", lambda *_: found.pop(0))
    shutil.rmtree(first)
    assert data_versions.opened(root) == second
