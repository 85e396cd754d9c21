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
# Ranks exchange their signals about so often, but not rarer than that; untuned. Clocks of ranks differ, steps do not.
_EXCHANGE_EVERY_S, _MOST_STEPS = 0.1, 16
_LONG_STEP_S = 1.0  # A step of that length is not begun before the answer is there, which takes milliseconds; untuned
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
        # The exchange that the call before has begun: signals and seconds of a step, work.
        self._exchange: tuple[torch.Tensor, typing.Any] | None = None
        self._interval, self._calls = 1, 0  # From one exchange to the next, and since the last one began
        self._has_long_steps = False
        self._exchanged_s = 0.0  # 0: not yet

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
        """Says whether any rank had a signal when the last exchange began: all stop at the same step. Collective.

        The exchange, on the CPU, goes on beside the next step, and the call after it reads the answer. Short steps
        share an exchange, so a signal is obeyed after at most _MOST_STEPS + 1 of them, and after two that take longer
        than _EXCHANGE_EVERY_S. From _LONG_STEP_S on, and with a single rank, no other step is begun.
        """
        asked = [float(number in self._asked) for number in _SIGNALS]
        if dist.get_world_size() > 1:
            asked = self._heard(asked)
        if any(asked[:-1]):
            self.exit_code = exit_codes.STOPPED
        elif asked[-1]:
            self.exit_code = exit_codes.INTERRUPTED
        return self.exit_code != exit_codes.FINISHED

    def _heard(self, asked: list[float]) -> list[float]:
        """Reads what all ranks were asked, if the call before began an exchange, and begins one where it is due."""
        heard = self._answer() if self._exchange is not None else [0.0] * len(asked)
        self._calls += 1
        if self._calls >= self._interval:
            now_s = time.monotonic()
            step_s = (now_s - self._exchanged_s) / self._calls if self._exchanged_s else _EXCHANGE_EVERY_S
            message = torch.tensor([*asked, min(step_s, _LONG_STEP_S)])
            self._exchanged_s, self._calls = now_s, 0
            self._exchange = message, dist.all_reduce(message, async_op=True)
            if self._has_long_steps:
                heard = self._answer()
        return heard

    def _answer(self) -> list[float]:
        """Waits for the exchange under way, and decides alike on all ranks, by the mean time of their steps."""
        assert self._exchange is not None
        message, work = self._exchange
        work.wait()
        self._exchange, (*heard, step_s) = None, message.tolist()
        step_s /= dist.get_world_size()
        self._interval = min(math.ceil(_EXCHANGE_EVERY_S / max(step_s, 1e-9)), _MOST_STEPS)
        self._has_long_steps = step_s > 0.9 * _LONG_STEP_S
        return heard
