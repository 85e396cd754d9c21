"""Shows text of files as text: control characters in it are no orders to a terminal."""

import logging
import re
import sys
import typing

from gpsd_dist.cli.names import as_typed
from gpsd_dist.disk.reading import why_passing

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""All but tab and line feed: ESC starts colours, titles and worse; the last ones turn the direction of writing."""
_NO_FILE_ACCESS = 74  # `distributed.exit_codes`, which the data pipeline does not import


def shown(text: object) -> str:
    """Replaces control characters by their escapes, ESC by a backslash and x1b, and words commands as the user does."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), as_typed(str(text)))


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def log_as_text(words: str, level: int = logging.WARNING, stream: typing.TextIO | None = None) -> None:
    """Sets logging up as `logging.basicConfig` does; control characters in messages and tracebacks become escapes."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_TextFormatter(words))
    logging.basicConfig(level=level, handlers=[handler])


def say_error(error: BaseException, mistake: int = 2) -> int:
    """Prints what ended a command, as text, and returns its status: `mistake`, or 74 for an error that passes."""
    sys.stderr.write(f"error: {shown(error)}\n")
    sys.stderr.flush()
    return _NO_FILE_ACCESS if why_passing(error) else mistake
