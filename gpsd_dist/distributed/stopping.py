"""Stops a run on request: a signal sets a flag, the ranks agree on a step, the trainer saves and ends there."""

import math
import signal
import time
import types
import typing

import torch
import torch.distributed as dist

from gpsd_dist.distributed import exit_codes

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # sent by a scheduler, by a lost terminal, by Ctrl-C
_EXCHANGE_EVERY_S, _MOST_STEPS = (
    0.1,
    16,
)  # ranks exchange their signals about so often, but not rarer than that; untuned
_IMPATIENT_AFTER_S = 2.0  # one Ctrl-C reaches a rank twice within that time: from the terminal and through torchrun


class StopRequests:
    """Handles signals inside its `with` block by a flag. A second Ctrl-C after two seconds interrupts at once.

    A signal that is ignored stays ignored (SIGHUP under nohup). Use it in the main thread, as Python demands.
    """

    def __init__(self) -> None:
        self.exit_code = exit_codes.FINISHED
        """STOPPED or INTERRUPTED once the ranks have agreed to stop; the same on all ranks."""
        self._asked: dict[int, float] = {}
        self._previous: dict[int, typing.Any] = {}
        self._exchange: tuple[torch.Tensor, typing.Any] | None = None  # The last exchange: signals and step time, work
        self._interval = self._steps = 1  # Calls from one exchange to the next, and those that are left
        self._exchanged_s = -math.inf

    def __enter__(self) -> "StopRequests":
        heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self.note) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._exchange is not None:
            self._exchange[1].wait()  # its threads would outlive the process group
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: types.FrameType | None = None) -> None:
        """Notes a signal; this is the handler."""
        first_s = self._asked.setdefault(number, time.monotonic())
        if number == signal.SIGINT and time.monotonic() - first_s > _IMPATIENT_AFTER_S:
            raise KeyboardInterrupt

    def note_orphaned(self) -> None:
        """Asks to stop as SIGTERM does, because the launcher has died. Any thread may call."""
        self.note(signal.SIGTERM)

    def agreed(self) -> bool:
        """Says whether any rank had received a signal by the exchange before: all stop at the same step. Collective.

        No rank waits for an answer: the exchange, on the CPU, goes on beside the steps, and its answer counts at the
        next one. Short steps share one exchange. A single rank is answered at once.
        """
        asked = torch.tensor([float(number in self._asked) for number in _SIGNALS])
        if dist.get_world_size() > 1:
            self._steps -= 1
            if self._steps:
                return False
            now_s, previous = time.monotonic(), self._exchange
            # The interval comes from a sum over ranks, so that all of them count the same number of steps.
            step_s = torch.tensor([min((now_s - self._exchanged_s) / self._interval, _EXCHANGE_EVERY_S)])
            self._exchanged_s, message = now_s, torch.cat((asked, step_s))
            self._exchange = message, dist.all_reduce(message, async_op=True)
            if previous is not None:
                previous[1].wait()
                *asked, step_s = previous[0].unbind()
                mean_s = max(float(step_s) / dist.get_world_size(), 1e-9)
                self._interval = min(math.ceil(_EXCHANGE_EVERY_S / mean_s), _MOST_STEPS)
            self._steps = self._interval
            if previous is None:
                return False
        if any(asked[:-1]):
            self.exit_code = exit_codes.STOPPED
        elif asked[-1]:
            self.exit_code = exit_codes.INTERRUPTED
        return self.exit_code != exit_codes.FINISHED
