"""Runs `python -m MODULE ARGUMENTS` in a process that is forked from one with the imports done.

Starting Python with torch and TorchRec takes 4 to 5 s of CPU time, a fork takes milliseconds. Arguments, environment,
working folder, output, signals and exit status are those of the command. Only its imports are not tried, so every
command also has a test that starts it for real.
"""

import contextlib
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import time
import types
import typing

import torch
import torch.distributed as dist

from gpsd_dist import commands
from tests.helpers.commands import environment
from tests.helpers.distributed import IMPORTED_ONCE, RANK_ENV, with_environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
_GRACE_S = 30.0  # after one rank failed, its peers have this long to fail by themselves


class Popen:
    """Starts one forked process; the part of `subprocess.Popen` that `gpsd_dist.commands` and the tests use.

    `args` is `[python, "-m", MODULE, ...]`. With `stdout=PIPE`, both streams can be read from `stdout` while it runs;
    else `communicate` returns both, or they are written to ours when it has ended.
    """

    def __init__(self, args: list[str], env: dict[str, str] | None = None, stdout: int | None = None, **_: typing.Any):
        assert args[1] == "-m", args
        self.args, self.returncode, self.stdout = args, None, None
        self._folder = tempfile.TemporaryDirectory(prefix="forked_")
        streams = [pathlib.Path(self._folder.name) / name for name in ("stdout", "stderr")]
        if stdout == subprocess.PIPE:
            streams[1] = streams[0]
            os.mkfifo(streams[0])
        self._streams = streams
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_ONCE)
        call = (args[2:], dict(os.environ if env is None else env), streams)
        self._process = context.Process(target=_run, args=call)
        with with_environment(RANK_ENV):
            self._process.start()
        if stdout == subprocess.PIPE:
            self.stdout = streams[0].open(errors="replace")  # waits until the child has opened its end

    def __enter__(self) -> "Popen":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.join()
        if self.stdout is not None:
            self.stdout.close()
        for number, path in enumerate(self._streams, start=1):
            if self.stdout is None and path.is_file():
                os.write(number, path.read_bytes())
        self._folder.cleanup()

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status; subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        self.returncode = self._process.exitcode
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def poll(self) -> int | None:
        """Returns the exit status, or None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, if it still runs."""
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits, and returns what was written to standard output and to standard error."""
        self.wait(timeout)
        out, err = (path.read_text(errors="replace") for path in self._streams)
        self._streams = []
        return out, err


def run(module: str, *arguments: object, ranks: int = 1, timeout_s: float = 150.0) -> subprocess.CompletedProcess:
    """Runs the command on so many ranks of one group; returns the first status that is not 0, and all their output."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    # The store of the group is ours, as it is torchrun's: no rank has to find a free port.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    facts = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]
    started = [Popen(command, environment(**own)) for own in facts]
    try:
        deadline = time.monotonic() + timeout_s
        while any(one.poll() is None for one in started) and time.monotonic() < deadline:
            if any(one.returncode not in (None, 0) for one in started):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(0.02)
        said = [one.communicate(timeout=0) for one in started]
    finally:
        for one in started:
            one.__exit__()
    status = next((one.returncode for one in started if one.returncode), 0)
    return subprocess.CompletedProcess(command, status, "".join(out for out, _ in said), "".join(e for _, e in said))


@contextlib.contextmanager
def children() -> typing.Iterator[None]:
    """Lets `fit`, `scaling` and `quickstart` of this process fork their trainings, instead of starting Python."""
    plain = commands.subprocess
    commands.subprocess = types.SimpleNamespace(**vars(plain) | {"Popen": Popen})
    try:
        yield
    finally:
        commands.subprocess = plain


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
