"""Shares one console between log lines and the progress bar, so that neither is printed into the other."""

import logging

import rich.console

from gpsd_dist.disk.text import shown

CONSOLE = rich.console.Console(stderr=True)


class ConsoleHandler(logging.Handler):
    """Prints log lines on CONSOLE: above the progress bar while one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record. Lines are not wrapped: paths and commands in them are copied."""
        try:
            CONSOLE.print(shown(self.format(record)), markup=False, highlight=False, emoji=False, soft_wrap=True)
        except Exception:  # as every handler of `logging` does: a line that cannot be printed must not end a run
            self.handleError(record)
