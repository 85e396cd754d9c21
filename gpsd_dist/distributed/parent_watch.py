"""Watches whether the launcher that started this process is still alive.

An orphaned rank still holds the output lock and blocks the restart.
"""

import contextlib
import os
import pathlib
import sys
import threading
import typing

from gpsd_dist.distributed import exit_codes

LAUNCHER_VARIABLE = "GPSD_LAUNCHER_PID"
"""Process id of `gpsd_dist.launcher`, which sets it: a rank that calls getppid() may be orphaned already."""
STORE_VARIABLE = "GPSD_STORE"
"""Path of the files through which the ranks of one machine meet; set by `gpsd_dist.launcher --standalone`."""
_POLL_S = 0.5


class LauncherGone(RuntimeError):
    """The launcher has died, so this rank must not begin anything."""


def launcher_pid() -> int | None:
    """Returns the process id of our launcher, else of torchrun; None outside of torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    handed_down = os.environ.get(LAUNCHER_VARIABLE)
    if handed_down is None:
        return os.getppid()
    if not (handed_down.isascii() and handed_down.isdigit()):
        raise ValueError(f"{LAUNCHER_VARIABLE}={handed_down!r} is no process id; leave it to gpsd_dist.launcher to set")
    return int(handed_down)


def is_gone(pid: int) -> bool:
    """Says whether no ancestor of this process has that id; an orphan gets another parent, so its chain changes.

    All ancestors count, because a shell script may stand between launcher and rank. Without /proc only the parent does.
    """
    ancestor, seen = os.getppid(), set[int]()
    while ancestor != pid:
        if ancestor <= 1 or ancestor in seen:
            return True
        seen.add(ancestor)
        try:
            stat = pathlib.Path(f"/proc/{ancestor}/stat").read_text()
        except OSError:
            return True
        ancestor = int(stat.rpartition(")")[2].split()[1])  # the process name in front may contain spaces and brackets
    return False


def check(pid: int | None) -> None:
    """Raises LauncherGone if there was a launcher and it has died."""
    if pid is not None and is_gone(pid):
        raise LauncherGone(_message(pid))


@contextlib.contextmanager
def leaving_with(pid: int | None) -> typing.Iterator[None]:
    """Ends this process if its launcher dies inside the block, where it waits for ranks that may never come.

    LauncherGone if the launcher has died before.
    """
    check(pid)
    is_over = threading.Event()

    def watch(launcher: int) -> None:
        while not is_over.wait(_POLL_S):
            if is_gone(launcher):
                sys.stderr.write(f"error: {_message(launcher)}\n")
                sys.stderr.flush()
                os._exit(exit_codes.FAILED)

    if pid is not None:
        threading.Thread(target=watch, args=(pid,), name="launcher", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _message(pid: int) -> str:
    return (
        f"the launcher of this rank (process {pid}) has ended before the ranks had joined their group; nothing was "
        "trained. Start the command again"
    )
