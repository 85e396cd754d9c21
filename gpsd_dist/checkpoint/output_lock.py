"""Lets one job at a time use an output folder, and checks beforehand that the folder can be written."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import time
import typing

from gpsd_dist.checkpoint import storage
from gpsd_dist.disk.reading import open_regular
from gpsd_dist.disk.writing import remove_leftovers
from gpsd_dist.distributed.main_rank import on_main

log = logging.getLogger(__name__)
LOCK_NAME = ".lock"
WAIT_S = 10.0  # the ranks of a job that was just killed may take a moment to leave
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_RETRY_S = 0.2


@contextlib.contextmanager
def held(
    folder: str | os.PathLike[str], wait_s: float = WAIT_S, checkpoints: storage.Location | None = None
) -> typing.Iterator[None]:
    """Makes `folder` and locks it for this job inside the block. Collective; rank 0 has the lock.

    `checkpoints`: where they will go, possibly elsewhere. It is not locked, but must be writable as well. The kernel
    releases the lock of a process that is gone, however it ended: a stale lock cannot exist.

    Raises, on all ranks:
        OSError: one of the two cannot be written, or another job holds the folder (names host, process and start).
            Trying again can help: a file server may take a minute to notice that a holder is cut off.
    """
    path = pathlib.Path(folder) / LOCK_NAME
    descriptor: int | None = None

    def take() -> None:
        nonlocal descriptor
        try:
            opened = _open(path)
            if _locked(opened, path, wait_s):
                descriptor = opened
            else:
                os.close(opened)
        except OSError as error:
            raise OSError(f"OUTPUT_DIR {path.parent} cannot be written, so nothing was trained: {error}") from error
        if descriptor is None:
            raise OSError(
                f"OUTPUT_DIR {path.parent} is in use by another job ({_holder(path)}), and two jobs would overwrite "
                "each other; wait for it, stop it, or use another OUTPUT_DIR"
            )
        try:
            if checkpoints is not None:
                storage.check_writable(checkpoints)
        except (OSError, ValueError) as error:
            raise OSError(f"{checkpoints} cannot be written, so nothing was trained: {error}") from error
        remove_leftovers(path.parent)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_facts()).encode(), 0)

    try:
        on_main(take)
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a full or broken disk has already been reported
                os.truncate(descriptor, 0)
            os.close(descriptor)


def _open(path: pathlib.Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)


def _locked(descriptor: int, path: pathlib.Path, wait_s: float) -> bool:
    """Tries for up to `wait_s` to get the lock. Returns whether this process has it."""
    end_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end_s:
                return False
            time.sleep(_RETRY_S)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks (%s); nothing stops a second job here", path, error)
            return True


def _facts() -> dict[str, typing.Any]:
    """Returns what the lock file says about its holder: host, process, start and job."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", ""),
    }


def _holder(path: pathlib.Path) -> str:
    """Describes the job that last wrote into the lock file."""
    try:
        facts = json.loads(path.read_text())
        job = f", job {facts['job']}" if facts["job"] else ""
        return f"host {facts['host']}, process {facts['pid']}, started {facts['started']}{job}"
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return "a process that has not written its name yet"
