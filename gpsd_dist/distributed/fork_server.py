"""Forks our commands from one process that has imported what they need, so that a tree of trials pays for it once.

A fork copies one thread: a lock that another one holds stays locked in the copy. So the server imports, forks and does
nothing else, and commands are started anew, as without it, where it has threads all the same, and where torch is built
for a GPU: a driver that was begun with does not survive a fork.
"""

import sys

if not __package__:
    sys.exit(
        "error: start it as a module, in the root of the repository: python -m gpsd_dist.distributed.fork_server ..."
    )

import atexit
import collections.abc
import fcntl
import gc
import importlib
import importlib.util
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import threading
import time
import traceback
import typing

COMMANDS = ("gpsd_dist.train", "gpsd_dist.evaluate", "gpsd_dist.launcher")
_PRELOADED = ("gpsd_dist.trainer", "gpsd_dist.trained_run")
_HARMLESS_THREADS = {"jemalloc_bg_thd"}  # Arrow's allocator; it has handlers for forks
_MAX_BYTES = 2**17  # of a request: command and environment
_POLL_S = 0.02
_NOT_FLUSHED = 120  # as Python ends where the last output cannot be written
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class ForkServer:
    """Belongs to the process that asks for commands. Use as a context: leaving it ends the server, not its commands."""

    def __init__(self, channel: socket.socket, launch: collections.abc.Callable[[], subprocess.Popen] | None = None):
        """`launch` starts the server at the other end of `channel`, when it is asked for the first time."""
        self._channel, self._launch = channel, launch
        self._program: subprocess.Popen | None = None
        self.is_gone = False  # the server
        self.statuses: dict[int, int] = {}
        """Exit status by process id, of commands that have ended; negative for signals, as Popen has it."""

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        if self._program is not None:
            self._program.wait()

    def start(
        self,
        command: collections.abc.Sequence[str],
        environment: collections.abc.Mapping[str, str],
        stdout: typing.Any = None,
        stderr: typing.Any = None,
        *,
        in_new_session: bool = False,
    ) -> "Forked | None":
        """Forks `python COMMAND`, one of COMMANDS; None where that cannot be done, and it has to be started anew.

        `stdout`, `stderr`: what has a file descriptor, or None for ours.
        """
        words = [word for word in command if word != "-u"]
        if words[:1] != ["-m"] or words[1] not in COMMANDS or self.is_gone:
            return None
        if self._launch is not None:
            self._program, self._launch = self._launch(), None
        request = {"command": words[1:], "environment": dict(environment), "in_new_session": in_new_session}
        message = json.dumps(request | {"folder": os.getcwd()}).encode()
        streams = [1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno()]
        if len(message) > _MAX_BYTES:  # the server would read its beginning alone
            return None
        try:
            socket.send_fds(self._channel, [message], streams)
        except OSError:  # no server any more, or less room in a socket than we take
            return None
        while not self.is_gone:
            for pid, status in self.receive(None):
                if status is None:
                    return Forked(pid, self) if pid else None
        return None

    def receive(self, timeout_s: float | None) -> list[tuple[int, int | None]]:
        """Waits for a message; returns (process id, exit status or None for a start) and keeps the statuses."""
        if self.is_gone:  # whoever asks again and again does so at leisure
            time.sleep(min(timeout_s or 0.0, _POLL_S))
            return []
        if not select.select([self._channel], [], [], timeout_s)[0]:
            return []
        try:
            message = self._channel.recv(_MAX_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:  # a signal handler has taken it
            return []
        except ConnectionError:
            message = b""
        self.is_gone = not message
        if not message:
            return []
        pid, status = json.loads(message)
        if status is not None:
            self.statuses[pid] = status
        return [(pid, status)]


class Forked:
    """Stands for a command that was forked, with the methods of `subprocess.Popen` that are used here."""

    def __init__(self, pid: int, server: ForkServer):
        self.pid, self._server = pid, server
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit status; None while it runs."""
        while self.returncode is None and self._server.receive(0):
            pass
        if self.returncode is None:
            self.returncode = self._server.statuses.pop(self.pid, None)
        if self.returncode is None and not self._is_there():
            # Its status may be under way, behind those of others; if not, the server was killed.
            while self.pid not in self._server.statuses and self._server.receive(1.0):
                pass
            self.returncode = self._server.statuses.pop(self.pid, -signal.SIGKILL)
        return self.returncode

    def _is_there(self) -> bool:
        try:
            state = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        # Without its server, nobody may ask for its status: process 1 of a container need not.
        return not (self._server.is_gone and state in "ZX")

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. subprocess.TimeoutExpired if it does not come in time."""
        end_s = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left_s = 1.0 if end_s is None else end_s - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired("a forked command", timeout or 0.0)
            self._server.receive(min(left_s, 1.0))
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        """Sends SIGTERM, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def start_server(environment: collections.abc.Mapping[str, str]) -> ForkServer | None:
    """Gives a server that is a process of its own, with these variables; None where forking is not safe."""
    if "OMP_NUM_THREADS" not in environment or _is_built_for_gpu():
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def launch() -> subprocess.Popen:
        with theirs:
            command = [sys.executable, "-m", "gpsd_dist.distributed.fork_server", str(theirs.fileno())]
            return subprocess.Popen(command, env=dict(environment), pass_fds=[theirs.fileno()])

    return ForkServer(ours, launch)


def fork_server() -> ForkServer | None:
    """Forks a server from this process, so that it stands between it and the commands; None if that is not safe.

    Imports by the server use as many threads as OMP_NUM_THREADS says at this time, so it has to be set.
    """
    if "OMP_NUM_THREADS" not in os.environ or _is_built_for_gpu() or _threads():
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            ours.close()
            serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    return ForkServer(ours)


def serve(channel: socket.socket) -> None:
    """Imports, then forks a command for each request, until the other end is closed."""
    # A signal to the whole job is for the commands, which save; the server lives as long as who asks it. Signals are
    # blocked and not ignored: what a command is sent in its first moments then waits until it can act on it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    hang_up = select.poll()
    hang_up.register(channel, 0)
    for module in _PRELOADED:
        try:
            importlib.import_module(module)
        except ImportError:  # the command that needs it says so
            break
    gc.freeze()  # else a collection would write to, and so copy, every page that is shared
    is_safe, num_running = not _threads(), 0
    while True:
        if select.select([channel], [], [], _POLL_S if num_running else None)[0]:
            message, streams, _, _ = socket.recv_fds(channel, _MAX_BYTES, 2)
            # Who asked may have left since, by Ctrl-C: nobody would stop the command.
            if not message or hang_up.poll(0):
                return
            waiting, begun = os.pipe()
            pid = os.fork() if is_safe else -1
            if pid == 0:
                channel.close()
                os.close(waiting)
                _become(message, streams, begun, before)
            for stream in (*streams, begun):
                os.close(stream)
            os.read(waiting, 1)  # until it has a session of its own, by which its launcher signals it, or has ended
            os.close(waiting)
            num_running += is_safe
            channel.send(json.dumps([max(pid, 0), None]).encode())
        while num_running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            num_running -= 1
            channel.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())


def _become(message: bytes, streams: list[int], begun: int, signals: set[int | signal.Signals]) -> None:
    """Turns this process into one that runs the command of the request, and ends it as Python would end.

    `begun` is closed when it can be signalled. `signals`: those that the command has blocked.
    """
    status = 1
    try:
        request = json.loads(message)
        if request["in_new_session"]:
            os.setsid()
        os.close(begun)
        streams.insert(0, os.open(os.devnull, os.O_RDONLY))
        # They come with the numbers of standard streams, perhaps of others, where the server was started without these.
        copies = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, len(streams)) for stream in streams]
        for stream in streams:
            os.close(stream)
        for number, stream in enumerate(copies):
            os.dup2(stream, number)
            os.close(stream)
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        for text in (sys.stdout, sys.stderr):
            text.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
        status = _run(request["command"])
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
        atexit._run_exitfuncs()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # a full disk, or closed
            status = _NOT_FLUSHED
        finally:
            os._exit(status)


def _run(command: list[str]) -> int:
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _threads() -> list[str]:
    """Names the other threads of this process that a fork would not copy."""
    tasks = [task for task in pathlib.Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return [name for task in tasks if (name := (task / "comm").read_text().strip()) not in _HARMLESS_THREADS]


def _is_built_for_gpu() -> bool:
    """Says whether torch is built for a GPU, without importing it; also where there is no torch, nor /proc."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or not os.path.isdir("/proc/self/task"):
        return True
    version = runpy.run_path(str(pathlib.Path(spec.origin).with_name("version.py")))
    return bool(version.get("cuda") or version.get("hip"))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
