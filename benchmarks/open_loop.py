"""Sends HTTP requests at times that do not depend on the answers (open loop), and measures from the planned time.

A closed loop slows down with the server and hides its latency ("coordinated omission"); MLPerf's LoadGen is open for
the same reason. Library of benchmarks.serving and of tests.
"""

import asyncio
import dataclasses
import random
import time

import numpy as np

_MAX_IDLE_S = 30  # as clients and balancers do; the server closes after 75
HEADER = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Status of one request (0: the connection broke), and seconds from its planned time to its last byte."""

    status: int
    latency_s: float
    body: bytes = b""
    late_s: float = 0.0
    """Seconds from the planned time until this program got to it: a part of `latency_s` that is not the server's"""


def poisson_times(rate_per_s: float, duration_s: float, seed: int = 0) -> list[float]:
    """Plans arrivals of a Poisson process, in seconds from the start."""
    rng, times, now = random.Random(seed), [], 0.0
    while (now := now + rng.expovariate(rate_per_s)) < duration_s:
        times.append(now)
    return times


class Client:
    """Keeps connections to one server open, as many as there are requests at once."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Sends one body and reads its answer: (status, body); status 0 if the connection broke."""
        try:
            reader, writer = self._fresh() or await asyncio.open_connection(self.host, self.port)
            writer.write(HEADER % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin1").lower().split("\r\n")
            length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
            answer = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            return 0, b""
        if "connection: close" in lines:
            writer.close()
        else:
            self._idle.append((reader, writer, time.monotonic()))
        return int(lines[0].split()[1]), answer

    def _fresh(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """Takes an idle connection that the server will not have closed, if there is one."""
        while self._idle:
            reader, writer, since_s = self._idle.pop()
            if time.monotonic() - since_s < _MAX_IDLE_S:
                return reader, writer
            writer.close()
        return None

    def close(self) -> None:
        """Closes idle connections."""
        for _, writer, _ in self._idle:
            writer.close()


async def send_at(
    host: str, port: int, bodies: list[bytes], times_s: list[float], keep_bytes: int | None = None
) -> list[Sample]:
    """Sends `bodies` in turn at `times_s` (seconds from now); returns the samples in that order.

    `keep_bytes`: of each answer at most; None: all.
    """
    client, start_s = Client(host, port), time.perf_counter()

    async def one(body: bytes, at_s: float) -> Sample:
        late_s = time.perf_counter() - start_s - at_s
        status, answer = await client.post(body)
        return Sample(status, time.perf_counter() - start_s - at_s, answer[:keep_bytes], late_s)

    tasks = []
    for number, at_s in enumerate(times_s):
        if (wait_s := start_s + at_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(one(bodies[number % len(bodies)], at_s)))
    samples = await asyncio.gather(*tasks)
    client.close()
    return list(samples)


def percentile_ms(samples: list[Sample], percent: float, *statuses: int) -> float:
    """Computes a percentile of the latencies with one of `statuses`, in milliseconds; nan without any."""
    chosen = [sample.latency_s * 1000 for sample in samples if sample.status in statuses]
    return float(np.percentile(chosen, percent)) if chosen else float("nan")
