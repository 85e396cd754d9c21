"""Writes files whole or not at all, never through a link, and on disk before anything refers to them."""

import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import stat
import typing

from gpsd_dist.disk.reading import not_a_file, open_regular

PIECE_BYTES = 64 * 2**20
"""So much is written before it is synced: at 200 MB/s a third of a second, so a large file is no silence of minutes."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.EOPNOTSUPP)  # of some file servers


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> typing.Iterator[typing.BinaryIO]:
    """Gives a binary file that takes the place of `path` when the block ends well; else nothing changes.

    It is written under a new name that nobody can guess, synced, renamed, and its folder synced. OSError for a link,
    pipe, device or folder in the place of `path`.
    """
    check_place(path)
    aside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(create(aside), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    sync(path.parent)


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that readers see whole or not at all, and that survives a loss of power."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: pathlib.Path, content: typing.Any) -> None:
    """Writes a JSON file like `write`."""
    write(path, (json.dumps(content, indent=1) + "\n").encode())


def create(path: pathlib.Path) -> int:
    """Makes a file that must not be there yet, not even as a link, and returns its descriptor."""
    return open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)


def check_place(path: pathlib.Path) -> None:
    """Raises OSError if there is something at `path` that is no plain file. A missing file is all right."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise not_a_file(path)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what `replacing` left in a folder when its process was killed. The caller alone may write there."""
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, are on disk. Some file servers cannot sync folders."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_SYNC_OF_FOLDERS:
            raise
    finally:
        os.close(descriptor)
