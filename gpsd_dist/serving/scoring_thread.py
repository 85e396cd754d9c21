"""Scores what the queue hands out, in the one thread of a process that computes.

The event loop keeps answering (refusals, health) while this thread is inside torch, numpy or Arrow.
"""

import logging
import threading
import time
import typing

from gpsd_dist.serving.queue import TokenQueue, Waiting

log = logging.getLogger(__name__)


class Late(Exception):
    """Raised for a request whose deadline passed before its turn came."""


class Observer(typing.Protocol):
    """Names what the thread tells about its work; `metrics.Metrics` is one."""

    def observe(self, phase: str, seconds: float) -> None:
        """Takes the seconds of one phase of one batch."""

    def scored(self, scorer: typing.Any, tokens: typing.Any, logits: typing.Any) -> None:
        """Takes a batch that was scored."""


class ScoringThread(threading.Thread):
    """Takes batches from `queue` until it is closed and empty."""

    def __init__(
        self,
        queue: TokenQueue,
        scorer: typing.Callable[[], typing.Any],
        observer: Observer,
        keep: typing.Callable[[list[dict], list[typing.Any]], None],
    ) -> None:
        """`scorer()` is asked once per batch, so that a batch never mixes versions; `keep` logs requests, answers."""
        super().__init__(name="scoring", daemon=True)
        self.queue, self.scorer, self.observer, self.keep = queue, scorer, observer, keep

    def run(self) -> None:
        """Runs until the queue is closed. An error answers its own request, never ends the thread."""
        while (taken := self.queue.take()) is not None:
            batch, late = taken
            for waiting in late:
                waiting.reply(Late())
            now_s = time.monotonic()
            for waiting in batch:
                self.observer.observe("queue", now_s - waiting.arrived_s)
            if batch:
                self._score(batch)

    def _score(self, batch: list[Waiting]) -> None:
        requests = [request for waiting in batch for request in waiting.requests]
        try:
            answers = self._answers(requests)
        except Exception as error:  # whatever it was, other requests have a right to their answers
            if len(batch) == 1:
                batch[0].reply(error)
            else:  # one of them is at fault: each alone
                for waiting in batch:
                    self._score([waiting])
            return
        first = 0
        for waiting in batch:
            waiting.reply(answers[first : first + len(waiting.requests)])
            first += len(waiting.requests)
        try:
            self.keep(requests, answers)
        except Exception:
            log.exception("logging requests failed; scoring goes on")

    def _answers(self, requests: list[dict[str, typing.Any]]) -> list[typing.Any]:
        scorer, observe, started_s = self.scorer(), self.observer.observe, time.perf_counter()
        tokens = scorer.reader(scorer.reader.from_json(requests))
        observe("ids", time.perf_counter() - started_s)
        logits = scorer.score_tokens(tokens, observe)
        started_s = time.perf_counter()
        answers = scorer.answers(tokens, logits)
        observe("answer", time.perf_counter() - started_s)
        self.observer.scored(scorer, tokens, logits)
        return answers
