"""Prints what the pipeline does while it works."""

import contextlib
import contextvars
import typing

import rich.progress

from gpsd_dist.disk.console import Console

COLUMNS = (
    rich.progress.TextColumn("{task.description:<24}"),
    rich.progress.BarColumn(bar_width=24),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
)


def say(text: str) -> None:
    """Prints one line as it is, at once."""
    Console(soft_wrap=True).print(text)


_warnings: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("warnings", default=None)


def warn(text: str) -> None:
    """Prints a warning at once, and keeps it for the end of the build."""
    kept = _warnings.get()
    if kept is None or text not in kept:
        say(f"warning: {text}")
    if kept is not None and text not in kept:
        kept.append(text)


@contextlib.contextmanager
def warnings() -> typing.Iterator[list[str]]:
    """Gives the list that the warnings of this block are added to."""
    kept: list[str] = []
    token = _warnings.set(kept)
    try:
        yield kept
    finally:
        _warnings.reset(token)


def bar() -> rich.progress.Progress:
    """Makes a progress bar in rows, with the time left."""
    return rich.progress.Progress(*COLUMNS)
