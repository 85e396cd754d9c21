"""Shows the progress of a run: a bar on a terminal, one log line per log step elsewhere."""

import collections
import collections.abc
import datetime
import logging
import math
import sys
import time

import rich.progress

from gpsd_dist.distributed.console import CONSOLE

_LOGGER = logging.getLogger(__name__)
_WINDOW = 20  # log steps over which the time left is estimated; untuned


class ProgressBar:
    """Shows loss, rates, MFU, peak memory of a GPU, step of total and time left. For rank 0 only."""

    def __init__(self, total_steps: int, *, first_step: int = 0, is_terminal: bool | None = None):
        """Starts the bar at `first_step`, the steps of a resumed run. `is_terminal` None asks standard error."""
        self._total_steps = total_steps
        self._shown: dict[str, float] = {}
        self._step = first_step
        self._line_step = -1
        self._times = collections.deque([(first_step, time.monotonic())], maxlen=_WINDOW)
        self._bar = None
        if sys.stderr.isatty() if is_terminal is None else is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f} steps  {task.fields[text]}"),
                console=CONSOLE,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, text="")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; cheap enough for every step."""
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text())

    def show(self, step: int, metrics: collections.abc.Mapping[str, float]) -> None:
        """Shows the numbers of a log step: in the bar, or as one line of the log."""
        self._times.append((step, time.monotonic()))
        self._shown.update(metrics)
        self.advance(step)
        if self._bar is None and step != self._line_step:  # a validation logs its step a second time
            self._line_step = step
            _LOGGER.info("step %d/%d  %s", step, self._total_steps, self._text())

    def _text(self) -> str:
        parts = []
        if "train/loss" in self._shown:
            parts.append(f"loss {self._shown['train/loss']:.4f}")
        for name, unit in (("perf/examples_per_s", "examples/s"), ("perf/tokens_per_s", "tokens/s")):
            if name in self._shown:
                parts.append(f"{self._shown[name]:,.0f} {unit}")
        if math.isfinite(self._shown.get("perf/mfu", math.nan)):
            parts.append(f"MFU {self._shown['perf/mfu']:.1%}")
        if "perf/peak_cuda_gib" in self._shown:
            parts.append(f"peak {self._shown['perf/peak_cuda_gib']:.1f} GiB")
        left_s = self.left_s()
        if math.isfinite(left_s):
            parts.append(f"{datetime.timedelta(seconds=round(left_s))} left")
        return "  ".join(parts)

    def left_s(self) -> float:
        """Estimates the seconds left by the speed of the last log steps, pauses included; NaN before two of them."""
        (first_step, first_s), (last_step, last_s) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return math.nan
        return max(self._total_steps - self._step, 0) * (last_s - first_s) / (last_step - first_step)

    def close(self, *, is_finished: bool = False) -> None:
        """Restores the terminal; may be called twice. A finished run ends at 100 %, also if it stopped early."""
        if self._bar is not None:
            if is_finished:
                self._total_steps = self._step
                self._bar.update(self._task, total=self._step, completed=self._step, text=self._text())
            self._bar.stop()
