"""Counts what the server does, for Prometheus: answers by status, time by phase, unknown ids, drift against training.

With several workers the values live in files of one folder (PROMETHEUS_MULTIPROC_DIR, set before this is imported), and
any worker answers for all of them.
"""

import os
import typing

import prometheus_client
from prometheus_client import multiprocess

from gpsd_dist.serving.drift import means

_PHASE_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0)
_TOKEN_BUCKETS = (10, 30, 100, 300, 1000, 2000, 5000, 20000)
_BATCHES_PER_MEAN = 8  # every eighth batch is looked at: it costs as much as 1 % of scoring it
_MEMORY = 0.99  # of a mean over recent batches: it forgets half of what it knows after 70 of those; untuned


class Metrics:
    """Holds every metric of one process; the methods may be called from any thread."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # a time beside each value, which nobody reads
        self.registry = prometheus_client.CollectorRegistry()
        counter, histogram, gauge = self._counter, self._histogram, self._gauge
        self._answers = counter("http_requests", "HTTP requests of /v1/score by status", "status")
        self._phases = histogram("phase_seconds", "Time of a batch (decode, queue: of a request)", "phase")
        self._batches = histogram("batch_tokens", "Tokens scored at once", buckets=_TOKEN_BUCKETS)
        self._scored = counter("scored", "Requests and candidates scored", "what")
        self._counts = counter("data", "Counted in requests: unknown ids, events dropped or put in order", "what")
        self._reloads = counter("reloads", "Changes of version by outcome", "outcome")
        self._log_errors = counter("request_log_errors", "Logged requests that could not be written")
        self.queue_tokens = gauge("queue_tokens", "Tokens waiting", mode="livesum")
        self._version = gauge("version", "1 for the version that is served", "version", mode="livemax")
        text = "Second since 1970 of the newest event that the counters know; 0 where the model counts nothing"
        self._counters_as_of = gauge("counters_as_of_seconds", text, mode="livemin")
        self._recent = gauge("recent", "Mean over recent batches", "what", mode="livemostrecent")
        self._reference = gauge("reference", "The same on the training split (statistics.json)", "what", mode="livemax")
        self._means: dict[str, float] = {}
        self._served: str | None = None
        self._num_batches = 0

    def _counter(self, name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"gpsd_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str, mode: typing.Any) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(f"gpsd_{name}", text, labels, registry=self.registry, multiprocess_mode=mode)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _PHASE_BUCKETS_S
    ) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(f"gpsd_{name}", text, labels, registry=self.registry, buckets=buckets)

    def observe(self, phase: str, seconds: float) -> None:
        """Adds one measurement of a phase."""
        self._phases.labels(phase).observe(seconds)

    def answered(self, status: int) -> None:
        """Counts an HTTP answer of `/v1/score`."""
        self._answers.labels(str(status)).inc()

    def scored(self, scorer: typing.Any, tokens: typing.Any, logits: typing.Any) -> None:
        """Counts a batch, and moves the recent means that drift is read from."""
        num_candidates = int(tokens.candidate_count_B.sum())
        self._scored.labels("requests").inc(len(tokens.candidate_count_B))
        self._scored.labels("candidates").inc(num_candidates)
        self._batches.observe(tokens.num_tokens)
        for what, count in tokens.counts.items():
            self._counts.labels(what).inc(count)
        self._num_batches += 1
        if self._num_batches % _BATCHES_PER_MEAN == 1:
            for what, value in means(scorer.manifest, tokens, logits).items():
                mean = self._means.get(what, value)
                self._means[what] = mean = _MEMORY * mean + (1 - _MEMORY) * value
                self._recent.labels(what).set(mean)

    def serve(self, scorer: typing.Any) -> None:
        """Names the version that is served from now on, the age of its counters, and what its training split was."""
        version, counters = scorer.version, scorer.reader.counters
        self._counters_as_of.set(0 if counters is None else counters.as_of_s)
        if self._served is not None:
            self._version.labels(self._served).set(0)
        self._version.labels(version).set(1)
        self._served = version
        for what, value in scorer.reference.items():
            self._reference.labels(what).set(value)

    def reloaded(self, outcome: str) -> None:
        """Counts an attempt to change the version."""
        self._reloads.labels(outcome).inc()

    def log_failed(self, count: int) -> None:
        """Counts requests that should have been logged."""
        self._log_errors.inc(count)

    def text(self) -> bytes:
        """Writes all metrics in Prometheus' text format; of all workers, where there are several."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = prometheus_client.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return prometheus_client.generate_latest(registry)
