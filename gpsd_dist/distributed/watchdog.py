"""Ends a rank that makes no progress, and says where it stood: a hung rank blocks all others for good.

Nothing here waits for a device or for another rank. What counts is the time between two calls of `note` or `alive`,
by a clock that no one can set back.
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
_BACKSTOP_FACTOR = 2  # of the timeout; for a thread that holds the interpreter lock, so that ours cannot run
_POLLS_PER_TIMEOUT = 20
_LONGEST_POLL_S = 1.0  # so soon a rank notices that its launcher is gone
_LAST_WORDS_S = 2.0  # the end of one rank ends the others: they look at their clocks before, and say where they stand


class Watchdog:
    """Of one process, inert until `watching`.

    The training loop tells it what it begins; the thread of `watching` looks at the clock.
    """

    def __init__(
        self,
        rank: int = 0,
        launcher_pid: int | None = None,
        *,
        clock: typing.Callable[[], float] = time.monotonic,
        end: typing.Callable[[str], None] | None = None,
    ):
        """`launcher_pid`: of the torchrun that starts this process again; None: nothing does.

        `end` gets the message of a hang; the default prints it with all stacks, and ends the process.
        """
        self._rank, self._clock, self._end = rank, clock, end or _end_process
        self._launcher_pid = launcher_pid
        self._step = self._first_step = 0
        self._phase, self._phase_s = "start", clock()
        self._alive_s = clock()
        self._collective = "none yet"
        self._num_waiting = self._num_writing = 0
        self._stopping = threading.Event()

    def note(self, phase: str, *, is_collective: bool = False, step: int | None = None) -> None:
        """This thread begins `phase` (of `step`). Progress. Costs two readings of the clock."""
        if step is not None:
            self._step = step
        if is_collective:
            self._collective = f"{phase} of step {self._step}"
        self._phase, self._phase_s = phase, self._clock()
        self.alive()

    def alive(self) -> None:
        """Progress inside a phase, from any thread: a batch of a validation, a part of a file."""
        self._alive_s = self._clock()

    @contextlib.contextmanager
    def waiting(self) -> typing.Iterator[None]:
        """The training loop only waits inside, for ranks that are watched themselves: silence is no hang."""
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            self.alive()

    @contextlib.contextmanager
    def writing(self) -> typing.Iterator[None]:
        """Some thread of this rank writes a file inside, and calls `alive`: silence is a hang even while `waiting`."""
        self.alive()
        self._num_writing += 1
        try:
            yield
        finally:
            self._num_writing -= 1
            self.alive()

    def silent_s(self) -> float:
        """Seconds since the last sign of progress."""
        return self._clock() - self._alive_s

    def message(self, timeout_s: float) -> str:
        """What is known of the hang."""
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
        """Watches the block; `on_orphaned` is called once if torchrun dies. `timeout_s` 0: nothing else is watched.

        `first_step`: steps that are done. In the next one FIRST_STEP_FACTOR times `timeout_s` may pass.
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
                if launcher_pid is not None:  # a C thread, which needs no interpreter lock; every poll puts it off
                    faulthandler.dump_traceback_later(_BACKSTOP_FACTOR * allowed_s, exit=True)
                if self._num_waiting and not self._num_writing:
                    self.alive()
                if self.silent_s() > allowed_s:
                    faulthandler.cancel_dump_traceback_later()
                    self._end(self.message(allowed_s))
                    break
        if timeout_s and launcher_pid is not None:
            faulthandler.cancel_dump_traceback_later()


def _end_process(message: str) -> None:
    """Without clean-up, which could hang too: whatever is half written is never picked up."""
    sys.stderr.write(f"watchdog: {message}\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(all_threads=True)
    time.sleep(_LAST_WORDS_S)
    os._exit(exit_codes.HUNG)
