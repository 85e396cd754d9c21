"""Runs the ordinary commands as children: shown as they would be typed, and stopped as this process is stopped.

What the commands that do so (`quickstart`, `fit`, `scaling`) have in common is here too.
"""

import argparse
import collections.abc
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import typing

from gpsd_dist.cli.names import PROGRAM, STARTED_BY, as_typed, with_plugin
from gpsd_dist.disk.text import say_error, shown
from gpsd_dist.distributed import exit_codes, huge_pages
from gpsd_dist.distributed.fork_server import Forked, ForkServer

REPO_ROOT = pathlib.Path(__file__).resolve().parents[1]
Command = tuple[str, ...]  # Arguments after `python`


class Stopped(Exception):
    """Says that this command, or a training of it, was asked to stop; what was trained is saved."""


class OutOfTime(Stopped):
    """Says that a child was asked to stop because its time was up."""


def python_command(num_processes: int, module: str, *arguments: str) -> Command:
    """Builds the command that runs a module in so many processes, by the launcher if they are several."""
    processes = ("gpsd_dist.launcher", "--nproc_per_node", str(num_processes), "--standalone", "-m")
    return ("-m", *(processes if num_processes > 1 else ()), module, *arguments)


def shell(command: Command) -> str:
    """Quotes the command so that it can be typed."""
    return with_plugin(as_typed(shlex.join(["python", *command])))


def exit_status(work: collections.abc.Callable[[], object]) -> int:
    """Does `work`, which runs commands, and returns one of `exit_codes`, or the status of the command that failed.

    What ended it goes to standard error, in words for a user.
    """
    try:
        work()
        return exit_codes.FINISHED
    except subprocess.CalledProcessError as error:
        command = shell(tuple(error.cmd[1:]))
        status = error.returncode if error.returncode > 0 else exit_codes.FAILED
        said = f"error: {error.output or ''}\nThis command failed with status {error.returncode}:\n  {command}\n"
        said += "What is finished is kept: the same command goes on from there."
    except (Stopped, KeyboardInterrupt) as error:
        status = exit_codes.INTERRUPTED
        said = f"{error}\nstopped; what was trained is saved, and the same command goes on from there".lstrip()
    except (ValueError, OSError) as error:
        return say_error(error)
    sys.stderr.write(f"{shown(said)}\n")
    return status


def add_overrides(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Adds what argparse did not know: `overrides` and `pretrain_overrides`, as `--gin.X=Y` of either stage."""
    unknown = [o for o in rest if not o.startswith(("--gin.", "--pretrain_gin.")) or "=" not in o]
    if unknown:
        parser.error(f"unknown arguments {unknown}; overrides look like --gin.EPOCHS=5 or --pretrain_gin.EPOCHS=5")
    args.overrides = [o for o in rest if o.startswith("--gin.")]
    args.pretrain_overrides = [o.replace("--pretrain_", "--", 1) for o in rest if o.startswith("--pretrain_gin.")]


def execute(
    command: Command,
    *,
    say: collections.abc.Callable[[str], None] | None = None,
    on_line: collections.abc.Callable[[str], None] | None = None,
    deadline_s: float = math.inf,
    server: ForkServer | None = None,
) -> None:
    """Runs `python COMMAND` as a child. SIGTERM is passed on to it: a training saves and ends, and then so do we.

    Args:
        command: what to run.
        say: shows the command before it runs.
        on_line: gets every line that the child writes, in a thread; without it, the child sees our terminal.
        deadline_s: `time.monotonic()` at which the child is asked to stop.
        server: forks the child, where it can.

    Raises OutOfTime after the deadline, Stopped if we were asked to stop, subprocess.CalledProcessError for a status.
    """
    if say is not None:
        say(f"$ {shell(command)}")
    signals: list[int] = []
    output = _Output(on_line)
    children: list[subprocess.Popen | Forked] = []  # none while the only one is being started

    def pass_on(number, frame) -> None:
        signals.append(number)
        for child in children:
            child.terminate()

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        children.append(output.start(command, server))
        if signals:
            children[0].terminate()
        status, is_late = _wait(children[0], deadline_s)
    finally:
        # After Ctrl-C, which the child has got too, it still saves: its last lines are read, and it is waited for.
        for child in children:
            child.wait()
        output.close()
        signal.signal(signal.SIGTERM, previous)
    if signals:
        raise Stopped(f"asked to stop during: {shell(command)}")
    if is_late and status:
        raise OutOfTime(f"its time was up during: {shell(command)}")
    if status:
        raise subprocess.CalledProcessError(status, ["python", *command])


def environment() -> dict[str, str]:
    """Gives the variables of a child: one thread unless ours say otherwise, and the path to this package."""
    return {"OMP_NUM_THREADS": "1"} | os.environ | huge_pages.environment() | search_path()


def search_path() -> dict[str, str]:
    """Gives the variables by which a child finds this package, and nothing in the folder in which we were started.

    `gpsd-dist` itself does not look there either; whoever types `python -m` has that folder first, also in children.
    """
    # An installed package is found without, and PYTHONPATH would put its neighbours before the standard library.
    here = "" if str(REPO_ROOT) == sysconfig.get_path("purelib") else str(REPO_ROOT)
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = {"PYTHONPATH": os.pathsep.join(folder for folder in dict.fromkeys((here, *given)) if folder)}
    return path | ({"PYTHONSAFEPATH": "1"} if os.environ.get(STARTED_BY) == PROGRAM else {})


class _Output:
    """Reads the lines of a child in a thread, and hands them to `on_line`; None: the child sees our terminal."""

    def __init__(self, on_line: collections.abc.Callable[[str], None] | None):
        self._on_line, self._reader = on_line, threading.Thread()

    def start(self, command: Command, server: ForkServer | None) -> subprocess.Popen | Forked:
        """Starts the child."""
        if self._on_line is None:
            return self._start(command, server, None)
        read, write = os.pipe()
        with open(write, "wb") as pipe:
            child = self._start(command, server, pipe)
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()
        return child

    def _start(self, command: Command, server: ForkServer | None, pipe: typing.Any) -> subprocess.Popen | Forked:
        forked = server.start(command, environment(), pipe, pipe) if server is not None else None
        streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
        return forked or subprocess.Popen([sys.executable, *command], env=environment(), **streams)

    def _read(self, read: int) -> None:
        with open(read, errors="replace") as lines:
            for line in lines:
                self._on_line(line.rstrip("\n"))

    def close(self) -> None:
        """Waits for the last line."""
        if self._reader.ident is not None:
            self._reader.join()


def _wait(child: subprocess.Popen | Forked, deadline_s: float) -> tuple[int, bool]:
    """Returns the status, and whether the child had to be asked to stop."""
    left_s = deadline_s - time.monotonic()
    try:
        return child.wait(None if math.isinf(left_s) else max(left_s, 0.0)), False
    except subprocess.TimeoutExpired:
        child.terminate()
        return child.wait(), True
