"""Wires one serving process: versions, queue, scoring thread, request log, HTTP, and how it ends."""

import argparse
import asyncio
import collections.abc
import contextlib
import functools
import logging
import signal
import socket
import sys
import threading
import typing

import pyarrow as pa
import uvicorn

from gpsd_dist.serving.app import App, Limits
from gpsd_dist.serving.metrics import Metrics
from gpsd_dist.serving.queue import TokenQueue
from gpsd_dist.serving.reload import Versions
from gpsd_dist.serving.request_log import RequestLog
from gpsd_dist.serving.scorer import load
from gpsd_dist.serving.scoring_thread import ScoringThread

log = logging.getLogger(__name__)
_SWITCH_S = 0.001  # the scoring thread yields to the event loop this often, so that refusals are quick; Python: 0.005
_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than balancers keep an idle connection (60 s): the side that asks should close it
_MAX_CONNECTIONS = 4096  # untuned


class Service:
    """One process that serves; needs an event loop in `run` only."""

    def __init__(
        self,
        args: argparse.Namespace,
        one_at_a_time: contextlib.AbstractContextManager,
    ) -> None:
        """`args` are those of gpsd_dist.serve. ArtefactError if the current version cannot be served."""
        pa.set_cpu_count(1)
        sys.setswitchinterval(_SWITCH_S)
        self.args, self.name = args, args.name or args.artefact.absolute().name
        self.metrics = Metrics()
        load_version = functools.partial(load, threads=1, history_cache_mib=args.history_cache_mib)
        self.versions = Versions(args.artefact, load_version, self._changed, one_at_a_time)
        self.metrics.serve(self.versions.scorer())
        self.queue = TokenQueue(args.queue_tokens, args.batch_tokens)
        self.log: RequestLog | None = None
        keep: typing.Callable[..., None] = lambda requests, answers: None  # noqa: E731
        if args.log_requests is not None:
            options = (args.sample, args.log_days, not args.log_user_ids, self._to_table, self.metrics.log_failed)
            try:
                self.log = RequestLog(args.log_requests, *options)
            except OSError as error:
                given = f"--log_requests {args.log_requests} cannot be written ({error.strerror})"
                raise OSError(f"{given}; choose another folder") from error
            keep = self.log.add
        self.scoring = ScoringThread(self.queue, self.versions.scorer, self.metrics, keep)
        limits = Limits(args.deadline_ms, int(args.max_body_mib * 2**20))
        self.app = App(self.name, self.versions.scorer, self.queue, self.metrics, limits)

    @property
    def version(self) -> str:
        """Returns the version that answers."""
        return self.versions.scorer().version

    async def run(self, listener: socket.socket, on_listening: typing.Callable[[], None]) -> None:
        """Serves on a bound socket until SIGTERM or SIGINT, then drains."""
        config = uvicorn.Config(
            self.app.asgi,
            http="httptools",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=max(1, int(self.args.drain_s)),
        )
        server, stop_watching = _Server(config), threading.Event()
        server.on_listening = on_listening
        loop, endings = asyncio.get_running_loop(), set()

        def end(linger_s: float) -> None:
            self.app.is_ready = False
            endings.add(loop.call_later(linger_s, setattr, server, "should_exit", True))

        loop.add_signal_handler(signal.SIGTERM, end, self.args.linger_s)
        loop.add_signal_handler(signal.SIGINT, end, 0.0)
        self.scoring.start()
        self.versions.watch(stop_watching, self.args.reload_s)
        await server.serve(sockets=[listener])
        stop_watching.set()
        self.queue.close()
        await asyncio.to_thread(self.scoring.join)
        if self.log is not None:
            await asyncio.to_thread(self.log.close)

    def _to_table(self, requests: list[dict[str, typing.Any]]) -> pa.Table:
        return self.versions.scorer().reader.from_json(requests)

    def _changed(self, outcome: str, scorer: typing.Any) -> None:
        self.metrics.reloaded(outcome)
        self.metrics.serve(scorer)


class _Server(uvicorn.Server):
    """Leaves signals to `Service`: uvicorn would raise them again at the end, and the exit status would not be 0."""

    on_listening: typing.Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # a server that bound the port at the same moment listens already
            ports = ", ".join(str(bound.getsockname()[1]) for bound in sockets or [])
            raise OSError(f"cannot listen on port {ports} ({error.strerror}); choose another --port") from error
        self.on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> collections.abc.Iterator[None]:
        yield
