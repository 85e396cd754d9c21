"""Folders and files on disk and behind fsspec URLs; a real S3 server: tests/integration/test_remote_checkpoints.py."""

import pathlib

import fsspec
import pytest

from gpsd_dist.checkpoint import storage
from gpsd_dist.checkpoint.storage import Remote, location


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """A folder that does not exist yet."""
    if request.param == "disk":
        return tmp_path / "new"
    return location(f"memory://{tmp_path.name}/new")


def test_paths_and_urls_are_told_apart(tmp_path):
    assert location("runs/a") == pathlib.Path("runs/a")
    assert location(f"file://{tmp_path}") == tmp_path
    assert location("memory://a/b/") == Remote("memory://a/b") == location(Remote("memory://a/b"))
    place = location("memory://a/b") / "c"
    assert (str(place), place.name, str(place.parent)) == ("memory://a/b/c", "c", "memory://a/b")


def test_unknown_scheme_says_what_to_do():
    with pytest.raises(ValueError, match="s4://bucket/run: Protocol not known: s4; install the fsspec package"):
        location("s4://bucket/run")


def test_scheme_without_its_package_names_the_package():
    fsspec.register_implementation("odd", "odd.Odd", errtxt="Install oddfs")
    with pytest.raises(ValueError, match="odd://bucket: Install oddfs"):
        location("odd://bucket")


def test_file_is_written_read_and_replaced(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for content in (b"first", b"second, longer"):
        storage.write(folder / "file", content)
        assert storage.read_bytes(folder / "file", 99) == content
        assert storage.num_bytes(folder / "file") == len(content)
    with (folder / "file").open("rb") as file:
        assert file.read(6) == b"second" and file.read() == b", longer"
    assert [path.name for path in folder.iterdir()] == ["file"]  # nothing is left aside


def test_names_and_kinds(folder):
    assert not folder.is_dir() and not (folder / "a").is_file()
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    storage.write(folder / "a", b"1")
    storage.write(folder / "sub" / "b", b"2")
    assert folder.is_dir() and (folder / "a").is_file() and not (folder / "sub").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "sub"]
    (folder / "a").rename(folder / "c")
    (folder / "sub" / "b").unlink()
    assert (folder / "c").is_file() and not (folder / "a").is_file() and not (folder / "sub" / "b").is_file()
    with pytest.raises(FileNotFoundError):
        storage.num_bytes(folder / "a")


def test_deleting_a_folder_begins_with_the_marker(folder, monkeypatch):
    """What a crash leaves of it does not look complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "marker", "z"):
        storage.write(folder / name, b"1")

    def crash(*args, **kwargs):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "rmtree", crash)
        patch.setattr(Remote, "delete_folder", crash)
        with pytest.raises(RuntimeError, match="killed"):
            storage.delete(folder, "marker")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "z"]
    storage.delete(folder, "marker")
    assert not folder.is_dir()


class Unreachable(Exception):
    pass


@pytest.mark.parametrize("error", [Unreachable("no route"), PermissionError("Forbidden"), OSError("reset by peer")])
def test_a_store_that_does_not_answer_is_an_error_and_not_an_empty_one(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    place = location("memory://bucket/x")
    storage.write(place, b"1")
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "info", fail)
    for ask in (place.is_file, place.is_dir, place.parent.is_dir):
        with pytest.raises(OSError, match=str(error)):
            ask()


def test_errors_of_a_stores_library_are_os_errors_with_the_url(monkeypatch):
    def fail(*args, **kwargs):
        raise Unreachable("no route")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "info", fail)
    with pytest.raises(OSError, match="memory://bucket/x: Unreachable: no route"):
        location("memory://bucket/x").is_file()


@pytest.mark.parametrize("url", ["s3://", "memory:///", "s3:////"])
def test_a_url_without_a_place_is_refused(url):
    with pytest.raises(ValueError, match=f"{url} names no place"):
        location(url)
