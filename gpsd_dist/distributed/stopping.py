"""Stopping on request: a signal is noted, the ranks agree on the step, the trainer saves and leaves."""

import signal
import time
import types

import torch

from gpsd_dist import exit_codes
from gpsd_dist.distributed.collectives import all_sum

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_IMPATIENT_AFTER_S = 2.0  # Ctrl-C reaches a rank twice, from the terminal and through torchrun


class StopRequests:
    """As a context: SIGTERM and SIGINT only set a flag. A second Ctrl-C, two seconds later or more, interrupts at once.

    Of the main thread, like every signal handler of Python.
    """

    def __init__(self) -> None:
        self.exit_code = exit_codes.FINISHED
        """STOPPED or INTERRUPTED once the ranks have agreed to stop; the same on all ranks."""
        self._asked: dict[int, float] = {}
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        self._previous = {number: signal.signal(number, self.note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: types.FrameType | None = None) -> None:
        """Handler of a signal."""
        first_s = self._asked.setdefault(number, time.monotonic())
        if number == signal.SIGINT and time.monotonic() - first_s > _IMPATIENT_AFTER_S:
            raise KeyboardInterrupt

    def note_orphaned(self) -> None:
        """The launcher is dead: its ranks belong to no one, and are in the way of the next start. As SIGTERM."""
        self.note(signal.SIGTERM)

    def agreed(self) -> bool:
        """Whether any rank has got a signal: it comes at different moments. Collective, on the CPU: no GPU sync."""
        asked = all_sum(torch.tensor([float(number in self._asked) for number in _SIGNALS]))
        if asked[0]:
            self.exit_code = exit_codes.STOPPED
        elif asked[1]:
            self.exit_code = exit_codes.INTERRUPTED
        return self.exit_code != exit_codes.FINISHED
