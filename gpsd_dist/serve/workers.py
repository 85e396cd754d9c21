"""Runs the serving processes: one in this process, or several children of it on one socket.

A worker listens when it is ready to serve, so no request reaches one that still loads.
"""

import argparse
import asyncio
import contextlib
import fcntl
import functools
import gc
import logging
import os
import signal
import socket
import tempfile
import threading
import typing

from gpsd_dist.disk.reading import why_passing
from gpsd_dist.distributed.exit_codes import NO_FILE_ACCESS

FAILED, BAD_OPTIONS = 1, 2
_RESTART_S = 0.5  # before a worker that ended is replaced
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
log = logging.getLogger(__name__)


def run_worker(
    args: argparse.Namespace,
    listener: socket.socket,
    one_at_a_time: contextlib.AbstractContextManager,
    on_listening: typing.Callable[[], object] = lambda: None,
) -> int:
    """Loads the artefact, serves until SIGTERM or SIGINT, answers what is under way; returns 0."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled here; see `batch.uncompiled`
    # Here, because with several workers prometheus_client must see PROMETHEUS_MULTIPROC_DIR when it is imported.
    from gpsd_dist.serving.service import Service

    service = Service(args, one_at_a_time)
    gc.freeze()  # what was loaded stays, so the collector need not walk through it while requests wait
    host, port = listener.getsockname()[:2]

    def listening() -> None:
        log.info("ready: %s %s on http://%s:%d", service.name, service.version, host, port)
        on_listening()

    asyncio.run(service.run(listener, listening))
    return 0


def run_workers(args: argparse.Namespace, listener: socket.socket) -> int:
    """Keeps `args.workers` processes running on one socket until SIGTERM or SIGINT.

    Returns 0, or the status of a worker that ended before any of them could serve.
    """
    with tempfile.TemporaryDirectory(prefix="gpsd_metrics_") as folder, tempfile.TemporaryFile() as lock:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from gpsd_dist.serving import service  # noqa: F401  imported once, so that workers share its memory

        gc.freeze()  # a collection would write into what is shared
        return _Workers(args, listener, lock).run()


class _Workers:
    """Parent of the serving processes: starts them, starts them again, passes signals on."""

    def __init__(self, args: argparse.Namespace, listener: socket.socket, lock: typing.Any) -> None:
        self.args, self.listener, self.lock = args, listener, lock
        self.stopping = threading.Event()
        self.children: set[int] = set()
        self.served, self.serves = os.pipe2(os.O_NONBLOCK)  # a byte from each worker that listens

    def run(self) -> int:
        status, has_served = 0, False
        for number in _SIGNALS:
            signal.signal(number, lambda number, _frame: self.stop(number))
        while self.children or not self.stopping.is_set():
            while len(self.children) < self.args.workers and not self.stopping.is_set():
                self.start()
            pid, ended = os.wait()
            self.children.discard(pid)
            if self.stopping.is_set():
                continue
            code = os.waitstatus_to_exitcode(ended)
            log.error("worker %d ended with status %d", pid, code)
            with contextlib.suppress(BlockingIOError):
                has_served |= bool(os.read(self.served, 1))
            if not has_served:
                status = max(code, FAILED)
                self.stop(signal.SIGTERM)
            self.stopping.wait(_RESTART_S)
        return status

    def stop(self, number: int) -> None:
        self.stopping.set()
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def start(self) -> None:
        # Blocked while forking, so that no worker misses a signal, and none runs the parent's handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            self.work()
        self.children.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def work(self) -> typing.NoReturn:
        status = FAILED
        try:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            status = run_worker(
                self.args, self.listener, FileLock(self.lock), functools.partial(os.write, self.serves, b"1")
            )
        except (ValueError, OSError) as error:
            log.error("%s", error)
            status = NO_FILE_ACCESS if why_passing(error) else BAD_OPTIONS
        except BaseException:
            log.exception("worker failed")
        finally:
            logging.shutdown()
            os._exit(status)


class FileLock(contextlib.AbstractContextManager):
    """Excludes other processes that inherited the same file; free as soon as its owner is gone, however it died."""

    def __init__(self, file: typing.Any) -> None:
        self._file = file

    def __enter__(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_error: object) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN)
