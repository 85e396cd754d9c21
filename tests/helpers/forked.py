"""Runs `python -m MODULE ARGUMENTS` in a process that is forked from one with the imports done.

Starting Python with torch and TorchRec takes 4 to 5 s of CPU time, a fork takes milliseconds. Arguments, environment,
working folder, output, signals and exit status are those of the command. Only its imports are not tried, so every
command also has a test that starts it for real.
"""

import multiprocessing
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import typing

import torch
import torch.distributed as dist

from gpsd_dist.distributed import fork_server
from tests.helpers.commands import environment
from tests.helpers.distributed import IMPORTED_ONCE, RANK_ENV, with_environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
_GRACE_S = 30.0  # after one rank failed, its peers have this long to fail by themselves


class Forked:
    """Starts one command; its output goes to files of `folder`. Has what tests use of `subprocess.Popen`."""

    def __init__(self, command: list[str], variables: dict[str, str], folder: pathlib.Path):
        self._streams = [folder / name for name in ("stdout", "stderr")]
        self.process = start(_run, command, variables, self._streams)

    def poll(self) -> int | None:
        """Returns the exit status; None while it runs."""
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float) -> list[str]:
        """Waits for the end, and returns what it wrote."""
        self.process.join(timeout)
        return self.said()

    def kill(self) -> None:
        """Ends it, if it has not ended, and waits for that."""
        self.process.kill()
        self.process.join()

    def said(self) -> list[str]:
        """Returns what it wrote to standard output and to standard error."""
        return [path.read_text(errors="replace") if path.is_file() else "" for path in self._streams]


def context(_: str = "") -> multiprocessing.context.ForkServerContext:
    """Gives what starts processes with the imports done; can stand for `multiprocessing.get_context`."""
    forking = multiprocessing.context._default_context.get_context("forkserver")
    forking.set_forkserver_preload(IMPORTED_ONCE)
    return forking


def start(target: typing.Callable, *arguments: object) -> multiprocessing.Process:
    """Calls `target`, a function of a module, in a process with the imports done; its environment is an earlier one."""
    process = context().Process(target=target, args=arguments)
    with with_environment(RANK_ENV):
        process.start()
    return process


def command_server(*_: object) -> fork_server.ForkServer:
    """Stands for `fork_server.start_server`, without the imports of a process of its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        start(_serve, theirs)
    return fork_server.ForkServer(ours)


def _serve(channel: socket.socket) -> None:
    torch.set_num_threads(1)
    fork_server.serve(channel)


def run(module: str, *arguments: object, ranks: int = 1, timeout_s: float = 150.0) -> subprocess.CompletedProcess:
    """Runs the command on so many ranks of one group; returns the first status that is not 0, and all their output."""
    command = [module, *map(str, arguments)]
    # The store of the group is ours, as it is torchrun's: no rank has to find a free port.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    facts = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]
    with tempfile.TemporaryDirectory(prefix="forked_") as root:
        folders = [pathlib.Path(root) / str(rank) for rank in range(ranks)]
        started = []
        try:
            for folder, own in zip(folders, facts, strict=True):
                folder.mkdir()
                started.append(Forked(command, environment(**own), folder))
            _wait([one.process for one in started], timeout_s)
        finally:
            for one in started:
                one.kill()
        outs, errors = zip(*(one.said() for one in started), strict=True)
    status = next((one.process.exitcode for one in started if one.process.exitcode), 0)
    return subprocess.CompletedProcess([sys.executable, "-m", *command], status, "".join(outs), "".join(errors))


def _wait(processes: list, timeout_s: float) -> None:
    """Returns when all have ended, or in vain when it has taken too long: what still runs is killed then."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.02)


def _run(command: list[str], variables: dict[str, str], streams: list[pathlib.Path]) -> None:
    """Becomes the command: its output, environment, working folder and arguments; then runs its module as __main__."""
    for number, path in enumerate(streams, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
