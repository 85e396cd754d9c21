"""Stops a run on request: a signal sets a flag, the ranks agree on a step, the trainer saves and ends there."""

import signal
import time
import types
import typing

import torch
import torch.distributed as dist

from gpsd_dist.distributed import exit_codes

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # sent by a scheduler, by a lost terminal, by Ctrl-C
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
        self._exchange: tuple[torch.Tensor, typing.Any] | None = None  # The last call's signals, and its exchange

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
        """Says whether any rank had received a signal by the previous call: all stop at the same step. Collective.

        The answer is one call late, so that no rank waits for it: the exchange, on the CPU, goes on beside the step. A
        single rank is answered at once.
        """
        asked, previous = torch.tensor([float(number in self._asked) for number in _SIGNALS]), self._exchange
        if dist.get_world_size() > 1:
            self._exchange = asked, dist.all_reduce(asked, async_op=True)
            if previous is None:
                return False
            asked, work = previous
            work.wait()
        if asked[:-1].any():
            self.exit_code = exit_codes.STOPPED
        elif asked[-1]:
            self.exit_code = exit_codes.INTERRUPTED
        return self.exit_code != exit_codes.FINISHED
