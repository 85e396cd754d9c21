"""Prints what the pipeline does while it works."""

import rich.console
import rich.progress

COLUMNS = (
    rich.progress.TextColumn("{task.description:<24}"),
    rich.progress.BarColumn(bar_width=24),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
)


def say(text: str) -> None:
    """Prints one line as it is, at once."""
    rich.console.Console(soft_wrap=True).print(text, markup=False, highlight=False)


def bar() -> rich.progress.Progress:
    """Makes a progress bar in rows, with the time left."""
    return rich.progress.Progress(*COLUMNS)
