"""Tells errors that pass (a file server restarts, memory is short) from damage, and reads again after them.

What does not pass within seconds is raised as `NotReadableNow`, an OSError: training and commands then end with status
74, after which the same command may be started again. Damage is what the bytes say, and is a ValueError elsewhere.
"""

import collections.abc
import errno
import io
import itertools
import logging
import os
import pathlib
import re
import stat
import time
import typing

log = logging.getLogger(__name__)
T = typing.TypeVar("T")
WAITS_S = (0.2, 1.0, 5.0)  # before the second, third and fourth try; untuned
_NAMES = [
    "EAGAIN",
    "EBUSY",
    "EIO",
    "EMFILE",
    "ENFILE",
    "ENOBUFS",
    "ENOLCK",
    "ENOMEM",
    "ESTALE",
    "EREMOTEIO",
    "ETIMEDOUT",
    "ECONNABORTED",
    "ECONNREFUSED",
    "ECONNRESET",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "ENETDOWN",
    "ENETRESET",
    "ENETUNREACH",
    "ENOTCONN",
    "EPIPE",
    "ESHUTDOWN",
]
PASSING = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
"""Numbers of errors that say nothing about the content of a file."""
_IN_TEXT = re.compile(r"\[errno (\d+)\]", re.IGNORECASE)  # Arrow's Parquet reader keeps the number in its text alone
_NO_THREAD = "can't start new thread"
_NO_MORE = "Resource temporarily unavailable"  # a thread of C++
_num_repeated = itertools.count(1)


class NotReadableNow(OSError):
    """Raised where a file could not be read, again and again, for a reason that is no damage."""


def why_passing(error: BaseException) -> str:
    """Says why an error is one that passes, in the system's words; empty if it is not."""
    if isinstance(error, NotReadableNow):
        return str(error)
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    if isinstance(error, OSError) and error.errno in PASSING:
        return os.strerror(error.errno)
    if isinstance(error, ConnectionError | TimeoutError):
        return str(error) or type(error).__name__
    text = str(error)
    numbers = [int(found) for found in _IN_TEXT.findall(text)]
    if any(number in PASSING for number in numbers):
        return ", ".join(map(os.strerror, numbers))
    return text if _NO_THREAD in text or _NO_MORE in text else ""


def raise_if_passing(what: object, error: BaseException) -> None:
    """Raises NotReadableNow for an error that passes, so that the caller may take all others for damage."""
    if isinstance(error, NotReadableNow):
        raise error
    if why := why_passing(error):
        raise NotReadableNow(_sentence(what, why, "")) from error


def again(what: object, work: collections.abc.Callable[[], T]) -> T:
    """Does `work`, which reads `what`, up to four times within seconds while its errors are of those that pass.

    Each try is logged, with the number of all that were repeated in this process. NotReadableNow after the last.
    """
    begin_s = time.monotonic()
    for wait_s in (*WAITS_S, None):
        try:
            return work()
        except NotReadableNow:
            raise  # something inside has been patient already
        except Exception as error:
            why = why_passing(error)
            if not why:
                raise
            if wait_s is None:
                took = f" after {1 + len(WAITS_S)} tries in {time.monotonic() - begin_s:.0f} s"
                raise NotReadableNow(_sentence(what, why, took)) from error
        number = next(_num_repeated)
        log.warning(
            "%s cannot be read now (%s); trying again in %g s (retry %d of this process)", what, why, wait_s, number
        )
        time.sleep(wait_s)
    raise AssertionError


def _sentence(what: object, why: str, took: str) -> str:
    return f"{what} cannot be read now ({why}){took}. That is no damage; once it can be read, the same command goes on"


def open_regular(path: "str | os.PathLike[str]", flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Opens a file and returns its descriptor. OSError at once for a folder, a pipe or a device in its place.

    With `os.O_NOFOLLOW` among the flags, a link in its place is such an error, too. The umask has the last word on the
    mode of a new file, so that a group with umask 002 shares its runs.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise not_a_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_a_file(path)
    return descriptor


def not_a_file(path: "str | os.PathLike[str]") -> OSError:
    """Words the error for a link, pipe, device or folder in the place of a file."""
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(os.lstat(path).st_mode), "a device or no plain file")
    return OSError(f"{os.fspath(path)} is {kind}, expected a plain file; remove it, or name another place")


def open_read(path: pathlib.Path) -> io.BufferedReader:
    """Opens a file for reading; links to files are followed. OSError at once for anything but a file."""
    return os.fdopen(open_regular(path), "rb")
