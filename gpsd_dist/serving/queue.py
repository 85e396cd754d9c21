"""Holds the requests that wait for the scoring thread: bounded by tokens, in order of arrival, each with a deadline.

A queue without a bound turns overload into latency for everybody (3x capacity: p99 of 6 s). This one refuses what does
not fit, and what has waited too long is handed out as late instead of being computed for nobody.
"""

import collections
import dataclasses
import threading
import time
import typing

_LOOK_AHEAD = 64  # waiting requests among which companions are sought; untuned, it bounds the work under the lock


@dataclasses.dataclass(eq=False, slots=True)
class Waiting:
    """Describes one HTTP request on its way to the scoring thread."""

    requests: list[dict[str, typing.Any]]
    num_tokens: int  # history events and candidates of all its requests
    arrived_s: float  # time.monotonic()
    deadline_s: float  # time.monotonic() after which nobody waits for the answer
    reply: typing.Callable[[typing.Any], None]
    """Takes the answer or the exception; called once, in the scoring thread."""


class TokenQueue:
    """Keeps at most `max_tokens` waiting tokens; `offer` and `take` never wait for one another's work."""

    def __init__(self, max_tokens: int, batch_tokens: int) -> None:
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        self.num_tokens = 0
        self.num_taken = 0
        """Batches handed out: whoever was refused may fit once this has changed."""
        self._waiting: collections.deque[Waiting] = collections.deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, waiting: Waiting) -> bool:
        """Appends a request, or returns False at once: it does not fit any more, or the queue is closed."""
        with self._changed:
            if self._is_closed or self.num_tokens + waiting.num_tokens > self.max_tokens:
                return False
            self._waiting.append(waiting)
            self.num_tokens += waiting.num_tokens
            self._changed.notify()
            return True

    def take(self) -> tuple[list[Waiting], list[Waiting]] | None:
        """Waits for requests; returns (batch to score, requests that are too late), or None once closed and empty.

        The batch is the oldest request and, up to `batch_tokens`, those that wait already and are most like it in
        length: similar lengths pad and bucket well. It never waits for companions.
        """
        with self._changed:
            while not self._waiting:
                if self._is_closed:
                    return None
                self._changed.wait()
            late = self._pop_late(time.monotonic())
            batch = self._pop_batch() if self._waiting else []
            self.num_tokens -= sum(waiting.num_tokens for waiting in (*late, *batch))
            self.num_taken += 1
            return batch, late

    def close(self) -> None:
        """Refuses further offers; what waits is still handed out."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _pop_late(self, now_s: float) -> list[Waiting]:
        late = []
        while self._waiting and self._waiting[0].deadline_s <= now_s:
            late.append(self._waiting.popleft())
        return late

    def _pop_batch(self) -> list[Waiting]:
        oldest = self._waiting.popleft()
        ahead = [self._waiting.popleft() for _ in range(min(_LOOK_AHEAD, len(self._waiting)))]
        batch, free = [oldest], self.batch_tokens - oldest.num_tokens
        chosen = set()
        for waiting in sorted(ahead, key=lambda other: abs(other.num_tokens - oldest.num_tokens)):
            if waiting.num_tokens <= free:
                chosen.add(id(waiting))
                batch.append(waiting)
                free -= waiting.num_tokens
        self._waiting.extendleft(reversed([waiting for waiting in ahead if id(waiting) not in chosen]))
        return batch
