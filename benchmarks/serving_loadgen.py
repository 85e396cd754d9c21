"""Lets MLPerf's LoadGen ask a scorer, in this process or over HTTP, and gives back LoadGen's own summary.

Server: requests arrive by a Poisson process; valid if the 99th percentile of the latency is within the target. Offline:
all samples are there at once, throughput counts. https://github.com/mlcommons/inference/tree/master/loadgen
"""

import array
import asyncio
import collections.abc
import contextlib
import pathlib
import tempfile
import threading
import time
import typing

import mlperf_loadgen as loadgen
import msgspec

from benchmarks.open_loop import Client
from gpsd_dist.serving.metrics import Metrics
from gpsd_dist.serving.queue import TokenQueue, Waiting
from gpsd_dist.serving.scoring_thread import ScoringThread

Issue = collections.abc.Callable[[bytes, collections.abc.Callable[[bool], None]], None]
"""Sends a body; calls back with whether it was scored."""
_NO_DEADLINE_S = 1e12
_ALL_TOKENS = 2**62
_MAX_CONNECTIONS = 256  # of Offline, where every sample is there at once; untuned
_NOTHING = array.array("B", [0])


def summary(
    scenario: str, bodies: list[bytes], issue: Issue, *, qps: float, latency_ms: float, duration_s: float
) -> tuple[str, int]:
    """Runs LoadGen once; returns its summary and the number of requests that were not scored."""
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, scenario)
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(duration_s * 1000)
    settings.min_query_count = int(qps * duration_s) if scenario == "Server" else 1
    settings.server_target_qps = settings.offline_expected_qps = qps
    settings.server_target_latency_ns = int(latency_ms * 1e6)
    failed: list[int] = []

    def issue_all(samples: list[typing.Any]) -> None:
        for sample in samples:
            issue(bodies[sample.index], lambda is_scored, number=sample.id: complete(number, is_scored))

    def complete(number: int, is_scored: bool) -> None:
        if not is_scored:
            failed.append(number)
        address, _ = _NOTHING.buffer_info()
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(number, address, 1)])

    sut = loadgen.ConstructSUT(issue_all, lambda: None)
    library = loadgen.ConstructQSL(len(bodies), len(bodies), lambda samples: None, lambda samples: None)
    with tempfile.TemporaryDirectory() as folder:
        logs, output = loadgen.LogSettings(), loadgen.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = folder, False
        logs.log_output, logs.enable_trace = output, False
        loadgen.StartTestWithLogSettings(sut, library, settings, logs)
        text = (pathlib.Path(folder) / "mlperf_log_summary.txt").read_text()
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(sut)
    return text, len(failed)


@contextlib.contextmanager
def in_process(scorer: typing.Any, batch_tokens: int) -> collections.abc.Iterator[Issue]:
    """Scores in this process, with the server's own queue and scoring thread; nothing is refused or late."""
    queue = TokenQueue(_ALL_TOKENS, batch_tokens)
    thread = ScoringThread(queue, lambda: scorer, Metrics(), lambda requests, answers: None)
    thread.start()
    item = scorer.manifest.item_feature

    def issue(body: bytes, done: collections.abc.Callable[[bool], None]) -> None:
        requests = msgspec.json.decode(body)["requests"]
        tokens = sum(len(request[f"{place}.{item}"]) for request in requests for place in ("history", "candidate"))

        def reply(result: typing.Any) -> None:
            done(not isinstance(result, Exception) and bool(msgspec.json.encode(result)))

        queue.offer(Waiting(requests, tokens, time.monotonic(), _NO_DEADLINE_S, reply))

    yield issue
    queue.close()
    thread.join()


@contextlib.contextmanager
def over_http(host: str, port: int) -> collections.abc.Iterator[Issue]:
    """Asks a server."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    client = Client(host, port)
    tasks: set[typing.Any] = set()

    free = asyncio.Semaphore(_MAX_CONNECTIONS)

    async def post(body: bytes, done: collections.abc.Callable[[bool], None]) -> None:
        async with free:
            status, _ = await client.post(body)
        done(status == 200)

    def issue(body: bytes, done: collections.abc.Callable[[bool], None]) -> None:
        task = asyncio.run_coroutine_threadsafe(post(body, done), loop)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    yield issue
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    client.close()
    loop.close()
