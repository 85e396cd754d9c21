"""Finds the version of a data set that a reader opens, and marks it as in use so that no build deletes it.

    OUT/current.json                  {"version": "0002-3fa9c1d2", "published": ["0001-...", "0002-..."]}
    OUT/versions/0002-3fa9c1d2/       a data set as `schema.py` describes it; its files never change
    OUT/in_use/0002-3fa9c1d2.HOST.*   one file per process that reads this version, touched while it lives

A reader calls `opened` once, at its start, and reads from the folder that it returns, whatever is built meanwhile. A
folder without `current.json` is read as it is: a data set older than versions, a copy, or one of `versions/`. Where a
data set older than versions was built again in its own folder, its files stay there as the version `ROOT`.

Marks are files that a living process touches, because readers may sit on other hosts: a process id says nothing there,
and locks of dead hosts stay on some file servers. Times are compared with that of a file just written on the same
server, so clocks of hosts do not matter. A reader without the right to write here leaves no mark, and can count on the
`--keep_versions` newest versions only.
"""

import atexit
import collections.abc
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import reprlib
import secrets
import socket
import threading
import time

from gpsd_dist import schema
from gpsd_dist.disk import reading

CURRENT_NAME, VERSIONS, IN_USE = "current.json", "versions", "in_use"
ROOT = "root"
NAME = re.compile(r"[0-9]{4,9}-[0-9a-f]{8}")
TOUCH_EVERY_S = 600.0
DEAD_AFTER_S = 24 * 3600.0  # a job that was frozen over night is still alive
_MAX_BYTES = 1 << 20
log = logging.getLogger(__name__)
_marks: set[pathlib.Path] = set()
_lock = threading.Lock()


def root_of(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder that was named as --out_dir: that of all versions, if `folder` is one of them."""
    path = pathlib.Path(folder)
    return path.parent.parent if path.parent.name == VERSIONS and NAME.fullmatch(path.name) else path


def name_of(folder: str | os.PathLike[str]) -> str:
    """Returns the name of the version in this folder, `ROOT` for a data set that is none of `versions/`."""
    path = pathlib.Path(folder)
    return ROOT if root_of(path) == path else path.name


def folder_of(root: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the folder of a version by its name."""
    return root if name == ROOT else root / VERSIONS / name


def published(root: pathlib.Path) -> tuple[str, tuple[str, ...]]:
    """Reads `current.json`: (name of the current version, all names from the oldest to the newest).

    ("", ()) without such a file. ValueError names the file if it holds anything else.
    """
    path = root / CURRENT_NAME
    try:
        content = reading.again(path, lambda: _read(path))
    except (FileNotFoundError, NotADirectoryError):
        return "", ()
    try:
        found = json.loads(content)
        current, names = found["version"], tuple(found["published"])
        is_right = all(isinstance(name, str) and (name == ROOT or NAME.fullmatch(name)) for name in (current, *names))
    except (ValueError, RecursionError, TypeError, KeyError):
        current, names, is_right = "", (), False
    if not is_right or current not in names:
        raise ValueError(
            f"{path} holds {reprlib.repr(content)}, expected the names of versions; name one of the folders in "
            f"{root / VERSIONS} as the data folder, or remove {path}: the next build then finds the versions again"
        )
    return current, names


def _read(path: pathlib.Path) -> str:
    with reading.open_read(path) as file:
        return file.read(_MAX_BYTES).decode("utf-8", "replace")


def current(data_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder to read now: the current version, or `data_dir` itself where there are no versions."""
    name, _ = published(pathlib.Path(data_dir))
    return folder_of(pathlib.Path(data_dir), name) if name else pathlib.Path(data_dir)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Describes the version that a reader needs where the current one may not do, such as that of a resumed run."""

    fits: collections.abc.Callable[[schema.Manifest], bool]
    first: str
    """Name of the version that is looked at first."""
    words: str
    """Completes "no version of OUT ..."."""


def find(data_dir: str | os.PathLike[str], wanted: Wanted | None = None) -> pathlib.Path:
    """Finds the current version, or what is wanted: the version that was named, then the current one, then the newest.

    Where there are no versions the answer is `data_dir`, fitting or not: the reader says what differs. ValueError if
    none of several versions fits.
    """
    data_dir = pathlib.Path(data_dir)
    if name_of(data_dir) == ROOT != name_of(data_dir.resolve()):  # "." inside of a version, or a link to one
        data_dir = data_dir.resolve()
    root = root_of(data_dir)
    name, names = published(root)
    if wanted is None or not name:
        return data_dir if data_dir != root else current(data_dir)
    on_disk = sorted((path.name for path in (root / VERSIONS).glob("*") if NAME.fullmatch(path.name)), reverse=True)
    named = [wanted.first, *([data_dir.name] if data_dir != root else []), name]
    for known in dict.fromkeys([*named, *on_disk, *names]):
        folder = folder_of(root, known)
        with contextlib.suppress(ValueError, FileNotFoundError, NotADirectoryError):  # it is being deleted, or damaged
            if (folder / schema.MANIFEST_NAME).is_file() and wanted.fits(schema.read_manifest(folder)):
                return folder
    raise ValueError(
        f"no version of {root} {wanted.words}; it has {', '.join(on_disk)}. If a later build deleted it "
        "(--keep_versions says how many stay), build it again from its raw files into another folder, or start afresh"
    )


def opened(data_dir: str | os.PathLike[str], wanted: Wanted | None = None) -> pathlib.Path:
    """Finds the version to read (see `find`), logs it and marks it as in use until this process ends."""
    for _ in range(3):
        folder = find(data_dir, wanted)
        if not published(root_of(folder))[0]:
            return folder
        _mark(folder)
        if (folder / schema.MANIFEST_NAME).is_file():
            log.info("data: version %s of %s", name_of(folder), root_of(folder))
            return folder
        # A build deleted it before it saw the mark, and after another version had become the current one.
    raise ValueError(f"{folder} is not there; name another version, or build {root_of(folder)} again")


def users(root: pathlib.Path, name: str, now_s: float) -> list[str]:
    """Names the processes that read a version. `now_s`: mtime of a file that was just written on the same server.

    Marks of processes that have been dead for a day are removed.
    """
    found = []
    for path in sorted((root / IN_USE).glob(f"{name}.*")):
        with contextlib.suppress(FileNotFoundError):  # its process has just ended
            if now_s - path.stat().st_mtime < DEAD_AFTER_S:
                found.append(path.name.removeprefix(f"{name}."))
            else:
                path.unlink()
    return found


def _mark(folder: pathlib.Path) -> None:
    root, name = root_of(folder), name_of(folder)
    if any(mark.parent.parent == root.absolute() and mark.name.startswith(f"{name}.") for mark in _marks):
        return
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:60]
    mark = root.absolute() / IN_USE / f"{name}.{host}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    except OSError as error:
        log.info("%s cannot be marked as in use (%s); builds keep it as one of the newest only", folder, error.strerror)
        return
    with _lock:
        if not _marks:
            threading.Thread(target=_keep_alive, name="data version", daemon=True).start()
            atexit.register(release, os.getpid())
        _marks.add(mark)


def _keep_alive() -> None:
    while True:
        time.sleep(TOUCH_EVERY_S)
        with _lock:
            for mark in _marks:
                with contextlib.suppress(OSError):
                    mark.touch()


def release(pid: int | None = None) -> None:
    """Removes the marks of this process. `pid`: do so in that process only, and not in those forked from it."""
    if pid in (None, os.getpid()):
        with _lock:
            while _marks:
                with contextlib.suppress(OSError):
                    _marks.pop().unlink()
