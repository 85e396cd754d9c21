"""Shows where the whole stands: one bar on a terminal, else a line at the beginning and at the end of each step."""

import collections
import contextlib
import os
import pathlib
import re
import time
import typing

import rich.progress

from gpsd_dist.disk.reading import open_regular
from gpsd_dist.distributed.console import CONSOLE
from gpsd_dist.report.tables import duration_text

_STEP = re.compile(r"step (\d+)/(\d+)  (.*)")
_WARNING = re.compile(r"\d\d:\d\d:\d\d rank \d+ [WE] (.*)")
_TAIL = 15  # lines of a child that are shown if it fails


class Display:
    """Numbers the steps, shows warnings of their commands, and keeps what they write in log files."""

    def __init__(self, num_steps: int, log_dir: pathlib.Path):
        self.num_steps, self._log_dir = num_steps, log_dir
        self._number, self._title, self._started_s = 0, "", 0.0
        self.start_up_s = 0.0
        """Longest time so far from the start of a training to its first logged step."""
        self._is_starting = False
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL)
        self._log: typing.TextIO | None = None
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=CONSOLE,
            disable=not CONSOLE.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._bar.update(self._task, completed=self.num_steps, description="")
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        CONSOLE.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, title: str) -> typing.Iterator["Step"]:
        """Surrounds one step; it ends with a line that says how long it took, and what the step remarks."""
        self._number += 1
        self._title = f"[{self._number}/{self.num_steps}] {title}"
        self._bar.update(self._task, completed=self._number - 1, description=self._title)
        started_s, step = time.monotonic(), Step()
        self._started_s, self._is_starting = started_s, True
        if self._bar.disable:
            self.say(f"{self._title} ...")
        self._tail.clear()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "_", title).strip("_")
        appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(open_regular(self._log_dir / f"{name}.log", appending), "a", encoding="utf-8") as self._log:
            yield step
        self._bar.update(self._task, completed=self._number)
        took = "kept" if step.is_kept else duration_text(time.monotonic() - started_s)
        self.say(f"{self._title}: {took}{f'; {step.remark}' if step.remark else ''}")

    def on_line(self, line: str) -> None:
        """Takes a line of the command of the present step."""
        self._tail.append(line)
        if self._log is not None:
            print(line, file=self._log, flush=True)
        if found := _STEP.search(line):
            if self._is_starting:
                self.start_up_s = max(self.start_up_s, time.monotonic() - self._started_s)
                self._is_starting = False
            done, total = int(found[1]), max(int(found[2]), 1)
            text = f"{self._title}, step {done} of {total}  {found[3]}"
            self._bar.update(self._task, completed=self._number - 1 + min(done / total, 1), description=text)
        elif found := _WARNING.match(line):
            self.say(f"    {found[1]}")

    def last_words(self) -> str:
        """Gives the errors among the last lines of the command of the present step, or all of them."""
        errors = [line.removeprefix("error: ") for line in self._tail if line.startswith("error: ")]
        return "\n".join(dict.fromkeys(errors or self._tail))


class Step:
    """Holds what a step says when it ends."""

    def __init__(self) -> None:
        self.remark = ""
        self.is_kept = False
