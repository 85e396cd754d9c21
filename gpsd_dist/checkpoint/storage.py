"""Reads and writes files on a local disk or behind an fsspec URL (s3://bucket/run, gs://bucket/run, memory://run).

A local folder can be renamed atomically. Object stores have neither that nor folders: there, one small file that is
written last says that the rest is complete (`manager`).
"""

import collections.abc
import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import shutil
import typing

import fsspec

from gpsd_dist.disk import reading, writing
from gpsd_dist.schema import nests_deeper
from gpsd_dist.validation import json_safe

_PROBE_NAME = ".probe"
MAX_NAME_LENGTH = 255
MAX_NESTING = 32
MAX_JSON_BYTES = 2**26  # untuned: a manifest in run_state.json takes some 100 kB


@dataclasses.dataclass(frozen=True, order=True)
class Remote:
    """A folder or file behind an fsspec URL, with the methods of `pathlib.Path` that checkpoints need.

    Nothing is cached between calls, because another process may have written. A store that cannot be reached raises
    OSError with the URL. `universal_pathlib` 0.3.10 does neither: without permission `is_dir` is False and `unlink`
    raises FileNotFoundError, so a run would start afresh beside its checkpoints.
    """

    url: str

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Returns the last part of the URL."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Remote":
        """Returns the folder that this is in."""
        return Remote(self.url.rsplit("/", 1)[0])

    @contextlib.contextmanager
    def _store(self) -> collections.abc.Iterator[tuple[typing.Any, str]]:
        """Gives (file system, path in it). Errors of the store's library, such as no credentials, become OSErrors."""
        try:
            system, path = fsspec.core.url_to_fs(self.url)
            system.invalidate_cache()
            yield system, path
        except (OSError, ValueError):
            raise
        except Exception as error:
            # Libraries of stores have dozens of errors of their own. All but missing credentials may pass.
            kind = OSError if "Credentials" in type(error).__name__ else ConnectionError
            raise kind(f"{self.url}: {type(error).__name__}: {error}") from error

    def is_file(self) -> bool:
        """Tells whether there is a file of this name. OSError if the store does not answer."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Tells whether anything is below this name. OSError if the store does not answer."""
        return self._kind() == "directory"

    def _kind(self) -> str:
        """Returns "file", "directory", or "" if nothing exists at this URL.

        fsspec's `isfile` answers False to every error as well: a store that is out of reach for a moment would look as
        if it held no checkpoint.
        """
        with self._store() as (system, path):
            try:
                return str(system.info(path)["type"])
            except FileNotFoundError:
                return ""

    def iterdir(self) -> list["Remote"]:
        """Lists what is in this folder; nothing if it does not exist."""
        with self._store() as (system, path):
            try:
                return [self / found.rstrip("/").rsplit("/", 1)[-1] for found in system.ls(path, detail=False)]
            except FileNotFoundError:
                return []

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Makes the folder if the store has folders."""
        with self._store() as (system, path):
            system.makedirs(path, exist_ok=exist_ok)

    @contextlib.contextmanager
    def open(self, mode: str) -> collections.abc.Iterator[typing.Any]:
        """Opens a binary stream. After an error in writing, part of the file may exist."""
        with self._store() as (system, path), system.open(path, mode) as stream:
            yield stream

    def write_bytes(self, content: bytes) -> None:
        """Writes the whole file in one request: readers see all of it or nothing."""
        with self._store() as (system, path):
            system.pipe_file(path, content)

    def unlink(self) -> None:
        """Deletes the file."""
        with self._store() as (system, path):
            system.rm_file(path)

    def rename(self, target: "Remote") -> None:
        """Copies the file and deletes the original. Not atomic."""
        with self._store() as (system, path):
            system.mv(path, system._strip_protocol(target.url))

    def delete_folder(self) -> None:
        """Deletes everything below this name."""
        with self._store() as (system, path):
            system.rm(path, recursive=True)

    def num_bytes(self) -> int:
        """Returns the size of the file."""
        with self._store() as (system, path):
            return int(system.size(path))


Location = pathlib.Path | Remote


def is_url(path: str) -> bool:
    """Tells whether this is a URL of anything but the local disk."""
    return "://" in path and not path.startswith("file://")


def location(path: "str | os.PathLike[str] | Remote") -> Location:
    """Converts a path or URL. ValueError if the scheme is unknown, its package is missing, or no place is named."""
    if isinstance(path, Remote):
        return path
    text = os.fspath(path)
    if not is_url(text):
        return pathlib.Path(text.removeprefix("file://"))
    try:
        fsspec.get_filesystem_class(text.split("://", 1)[0])
    except (ValueError, ImportError) as error:
        raise ValueError(f"{text}: {error}; install the fsspec package of this scheme, or use another place") from error
    if not text.split("://", 1)[1].strip("/"):
        raise ValueError(f"{text} names no place in the store; expected a URL like s3://bucket/run")
    return Remote(text.rstrip("/"))


def is_plain_name(name: typing.Any) -> bool:
    """Tells whether this is the name of a file, and cannot lead out of a folder."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        return False
    return not set(name) & set("/\\:") and name not in (".", "..")  # on Windows, C:x is a file of drive C


def open_read(path: Location) -> typing.Any:
    """Opens a file for reading, as a context. OSError at once for a pipe or a device on a disk."""
    return path.open("rb") if isinstance(path, Remote) else reading.open_read(path)


def read_bytes(path: Location, max_bytes: int) -> bytes:
    """Reads the whole file, by several tries if need be. ValueError if it is larger; OSError if it cannot be read."""

    def read() -> bytes:
        with open_read(path) as file:
            return bytes(file.read(max_bytes + 1))

    content = reading.again(path, read)
    if len(content) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes:,} bytes, which no file of ours has here")
    return content


def read_json(path: Location, max_bytes: int = MAX_JSON_BYTES) -> dict[str, typing.Any]:
    """Reads the object in a file. ValueError names a file that is no JSON object; OSError if it cannot be read."""
    content = read_bytes(path, max_bytes)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    if nests_deeper(value, MAX_NESTING):
        raise ValueError(f"{path} nests its values more than {MAX_NESTING} deep")
    return value


def write(path: Location, content: bytes) -> None:
    """Writes a file that readers see whole or not at all; on a local disk it survives a loss of power."""
    if isinstance(path, Remote):
        path.write_bytes(content)
    else:
        writing.write(path, content)


def write_json(path: pathlib.Path, content: typing.Any) -> None:
    """Writes a JSON file like `write`, and its folder if that is missing. NaN and infinities become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.write_json(path, json_safe(content))


def check_writable(folder: Location) -> None:
    """Makes the folder, writes a file there and deletes it. OSError or ValueError from the store if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"{_PROBE_NAME}-{secrets.token_hex(8)}"
    if isinstance(probe, pathlib.Path):
        os.close(writing.create(probe))
    else:
        probe.write_bytes(b"can this be written?")
    probe.unlink()


def delete(folder: Location, marker: str) -> None:
    """Deletes a folder with all files, `marker` first: what a crash leaves does not look complete.

    If `folder` is a link, only the link goes.
    """
    if isinstance(folder, pathlib.Path) and folder.is_symlink():
        folder.unlink()
        return
    if (folder / marker).is_file():
        (folder / marker).unlink()
    if isinstance(folder, Remote):
        folder.delete_folder()
    else:
        shutil.rmtree(folder)


def num_bytes(path: Location) -> int:
    """Returns the size of a file. FileNotFoundError if there is none."""
    return path.num_bytes() if isinstance(path, Remote) else path.stat().st_size
