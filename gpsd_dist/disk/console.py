"""Makes the consoles of all commands: what they print is text, and no markup or order to a terminal."""

import collections.abc
import typing

import rich.console
import rich.segment

from gpsd_dist.disk.text import shown


class Console(rich.console.Console):
    """Prints names from files (metrics, tasks, columns, paths) as they are, control characters as their escapes."""

    def __init__(self, **options: typing.Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, *arguments: typing.Any, **options: typing.Any) -> collections.abc.Iterable[rich.segment.Segment]:
        """Yields the pieces of what is printed; those with a `control` are rich's own, such as a cursor that moves."""
        for piece in super().render(*arguments, **options):
            yield piece if piece.control else rich.segment.Segment(shown(piece.text), piece.style)
