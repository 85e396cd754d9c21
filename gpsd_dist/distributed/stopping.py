"""Stopping on request: a signal is noted, the ranks agree on the step, the trainer saves and leaves."""

import signal
import time
import types
import typing

import torch

from gpsd_dist.distributed import exit_codes
from gpsd_dist.distributed.collectives import all_sum

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # of a scheduler, of a lost terminal, Ctrl-C
_IMPATIENT_AFTER_S = 2.0  # Ctrl-C reaches a rank twice, from the terminal and through torchrun


class StopRequests:
    """As a context: the signals only set a flag. A second Ctrl-C, two seconds later or more, interrupts at once.

    A signal that is ignored stays ignored (SIGHUP under nohup). For the main thread, as all of Python's handlers.
    """

    def __init__(self) -> None:
        self.exit_code = exit_codes.FINISHED
        """STOPPED or INTERRUPTED once the ranks have agreed to stop; the same on all ranks."""
        self._asked: dict[int, float] = {}
        self._previous: dict[int, typing.Any] = {}

    def __enter__(self) -> "StopRequests":
        heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self.note) for number in heeded}
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
        if asked[:-1].any():
            self.exit_code = exit_codes.STOPPED
        elif asked[-1]:
            self.exit_code = exit_codes.INTERRUPTED
        return self.exit_code != exit_codes.FINISHED
