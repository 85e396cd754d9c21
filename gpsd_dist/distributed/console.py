"""Shares one console between log lines and the progress bar, so that neither is printed into the other."""

import logging

from gpsd_dist.disk.console import Console

CONSOLE = Console(stderr=True)


class ConsoleHandler(logging.Handler):
    """Prints log lines on CONSOLE: above the progress bar while one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record. Lines are not wrapped: paths and commands in them are copied."""
        try:
            CONSOLE.print(self.format(record), soft_wrap=True)
        except Exception:  # as every handler of `logging` does: a line that cannot be printed must not end a run
            self.handleError(record)
