"""Ends a rank that makes no progress and reports its phase, because a hung rank blocks all others forever.

It measures the time between calls of `note` or `alive` on a monotonic clock, and never waits for a device or a rank.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import typing

from gpsd_dist.distributed import exit_codes, parent_watch

FIRST_STEP_FACTOR = 4  # the first step compiles, tunes and fills caches; untuned
SYNC_TIMEOUT_S = 1800.0
"""A sync of `disk.writing.PIECE_BYTES` may take so long: a disk of 40 kB/s, or one that others keep busy. Untuned."""
# After this many timeouts a timer in C ends the process: our thread cannot, while another holds the interpreter lock.
_BACKSTOP_FACTOR = 2
_POLLS_PER_TIMEOUT = 20
_LONGEST_POLL_S = 1.0  # a rank notices within this time that its launcher has died
# Waited before it ends, because the launcher then kills the other ranks, which may have a message of their own.
_LAST_WORDS_S = 2.0


class Watchdog:
    """Watches one process, from `watching` on: the training loop notes phases, a thread looks at the clock."""

    def __init__(
        self,
        rank: int = 0,
        launcher_pid: int | None = None,
        *,
        clock: typing.Callable[[], float] = time.monotonic,
        end: typing.Callable[[str], None] | None = None,
    ):
        """Takes the pid of the torchrun that restarts this process, if there is one, and what to do about a hang.

        `end` is called with the message. By default it prints that and the stacks of all threads, and ends the process.
        """
        self._rank, self._clock, self._end = rank, clock, end or _end_process
        self._launcher_pid = launcher_pid
        self._step = self._first_step = 0
        self._phase, self._phase_s = "start", clock()
        self._alive_s = clock()
        self._collective = "none yet"
        self._num_waiting = self._num_writing = self._num_syncing = 0
        self._stopping = threading.Event()

    def note(self, phase: str, *, is_collective: bool = False, step: int | None = None) -> None:
        """Notes that the training loop begins `phase` (of `step`), which is progress. Costs two clock readings."""
        if step is not None:
            self._step = step
        if is_collective:
            self._collective = f"{phase} of step {self._step}"
        self._phase, self._phase_s, self._alive_s = phase, self._clock(), self._clock()

    def alive(self) -> None:
        """Notes progress inside a phase, from any thread: a batch of a validation, a part of a file."""
        self._alive_s = self._clock()

    @contextlib.contextmanager
    def waiting(self) -> typing.Iterator[None]:
        """Marks a block that only waits for other ranks, which have watchdogs of their own: silence is no hang."""
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            self.alive()

    @contextlib.contextmanager
    def writing(self) -> typing.Iterator[None]:
        """Marks a block that writes a file and calls `alive`: silence is a hang, even while another thread waits."""
        self.alive()
        self._num_writing += 1
        try:
            yield
        finally:
            self._num_writing -= 1
            self.alive()

    @contextlib.contextmanager
    def syncing(self) -> typing.Iterator[None]:
        """Marks a block that waits for a disk or a store, which may be busy: it has a limit of its own."""
        self.alive()
        self._num_syncing += 1
        try:
            yield
        finally:
            self._num_syncing -= 1
            self.alive()

    def message(self, timeout_s: float) -> str:
        """Describes the hang: rank, host, step, phase, last collective, and what to do."""
        since_s = self._clock() - self._phase_s
        return (
            f"rank {self._rank} (host {socket.gethostname()}, pid {os.getpid()}): no progress for {timeout_s:.0f} s. "
            f"Step {self._step}, in '{self._phase}' for {since_s:.0f} s; last collective begun: {self._collective}. "
            f"This rank ends with status {exit_codes.HUNG}, so that its launcher starts all ranks again from the last "
            "checkpoint. If the phase is known to take longer, raise --gin.TrainConfig.hang_timeout_s (0: off)"
        )

    @contextlib.contextmanager
    def watching(
        self, timeout_s: float, first_step: int, on_orphaned: typing.Callable[[], None] | None = None
    ) -> typing.Iterator[None]:
        """Watches the block; calls `on_orphaned` once if torchrun dies. `timeout_s` 0 turns the hang check off.

        `first_step`: steps that are done; the next one gets FIRST_STEP_FACTOR times `timeout_s`.
        """
        self._step = self._first_step = first_step
        self.alive()
        self._stopping.clear()
        thread = threading.Thread(target=self._watch, args=(timeout_s, on_orphaned), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()

    def _watch(self, timeout_s: float, on_orphaned: typing.Callable[[], None] | None) -> None:
        launcher_pid = self._launcher_pid
        poll_s = min(timeout_s / _POLLS_PER_TIMEOUT or _LONGEST_POLL_S, _LONGEST_POLL_S)
        while not self._stopping.wait(poll_s):
            if on_orphaned is not None and launcher_pid is not None and parent_watch.is_gone(launcher_pid):
                on_orphaned()
                on_orphaned = None
            if timeout_s:
                allowed_s = timeout_s * (FIRST_STEP_FACTOR if self._step <= self._first_step + 1 else 1)
                if self._num_syncing:
                    allowed_s = max(allowed_s, SYNC_TIMEOUT_S)
                if launcher_pid is not None:  # Every poll starts the timer in C anew, so it fires only if polls stop.
                    faulthandler.dump_traceback_later(_BACKSTOP_FACTOR * allowed_s, exit=True)
                if self._num_waiting and not self._num_writing:
                    self.alive()
                if self._clock() - self._alive_s > allowed_s:
                    faulthandler.cancel_dump_traceback_later()
                    self._end(self.message(allowed_s))
                    break
        if timeout_s and launcher_pid is not None:
            faulthandler.cancel_dump_traceback_later()


def _end_process(message: str) -> None:
    """Ends the process without clean-up, which could hang too; half-written files are never picked up."""

    def say() -> None:
        sys.stderr.write(f"watchdog: {message}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)

    # In a thread: where nobody reads our standard error any more, its pipe is full, and that may be the hang.
    threading.Thread(target=say, daemon=True).start()
    time.sleep(_LAST_WORDS_S)
    os._exit(exit_codes.HUNG)
