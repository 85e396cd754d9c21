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
import threading
import time

from gpsd_dist.disk.text import say_error, shown
from gpsd_dist.distributed import exit_codes, huge_pages

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
    return shlex.join(["python", *command])


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
) -> None:
    """Runs `python COMMAND` as a child. SIGTERM is passed on to it: a training saves and ends, and then so do we.

    Args:
        command: what to run.
        say: shows the command before it runs.
        on_line: gets every line that the child writes, in a thread; without it, the child sees our terminal.
        deadline_s: `time.monotonic()` at which the child is asked to stop.

    Raises OutOfTime after the deadline, Stopped if we were asked to stop, subprocess.CalledProcessError for a status.
    """
    if say is not None:
        say(f"$ {shell(command)}")
    search_path = os.pathsep.join(filter(None, (str(REPO_ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | huge_pages.environment() | {"PYTHONPATH": search_path}
    signals: list[int] = []
    with subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if on_line is None else subprocess.PIPE,
        stderr=None if on_line is None else subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:

        def pass_on(number, frame) -> None:
            signals.append(number)
            child.terminate()

        reader = threading.Thread(target=_read, args=(child, on_line), daemon=True)
        reader.start()
        previous = signal.signal(signal.SIGTERM, pass_on)
        try:
            status, is_late = _wait(child, deadline_s)
        finally:
            # After Ctrl-C, which the child has got too, it still saves: its last lines are read, and it is waited for.
            child.wait()
            reader.join()
            signal.signal(signal.SIGTERM, previous)
    if signals:
        raise Stopped(f"asked to stop during: {shell(command)}")
    if is_late and status:
        raise OutOfTime(f"its time was up during: {shell(command)}")
    if status:
        raise subprocess.CalledProcessError(status, ["python", *command])


def _read(child: subprocess.Popen, on_line: collections.abc.Callable[[str], None] | None) -> None:
    for line in child.stdout or ():
        if on_line is not None:
            on_line(line.rstrip("\n"))


def _wait(child: subprocess.Popen, deadline_s: float) -> tuple[int, bool]:
    """Returns the status, and whether the child had to be asked to stop."""
    left_s = deadline_s - time.monotonic()
    try:
        return child.wait(None if math.isinf(left_s) else max(left_s, 0.0)), False
    except subprocess.TimeoutExpired:
        child.terminate()
        return child.wait(), True
