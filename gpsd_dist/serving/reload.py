"""Changes the version under a running server: makes the new one ready beside the old one, then swaps one reference.

A version that is damaged or answers its examples otherwise never gets there: the old one goes on. Rollback is a write
of `current.json` with the older version, whose scorer is still in memory.
"""

import contextlib
import logging
import os
import pathlib
import threading
import typing

from gpsd_dist.disk.reading import NotReadableNow, why_passing
from gpsd_dist.serving.artefact import CURRENT_NAME, ArtefactError, read_bytes
from gpsd_dist.serving.counters import POINTER_NAME

log = logging.getLogger(__name__)
_NICENESS = 10  # of the loading thread: requests come first


class Versions:
    """Holds the scorer that answers, and the one before it."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        load: typing.Callable[[pathlib.Path], typing.Any],
        on_change: typing.Callable[[str, typing.Any], None],
        one_at_a_time: contextlib.AbstractContextManager,
    ) -> None:
        """Loads the current version; whatever is wrong with it is raised.

        `load` verifies, builds and replays. `on_change(outcome, scorer)` hears of "loaded", "rolled back" and "failed".
        `one_at_a_time` keeps the workers of a machine from loading all at once.
        """
        self.root, self._load, self._on_change = pathlib.Path(root), load, on_change
        self._one_at_a_time = one_at_a_time
        self._pointer = self._read_pointer()  # before loading: a change meanwhile is seen by the next poll
        self._scorer = load(self.root)
        self._known: dict[bytes, typing.Any] = {self._pointer: self._scorer}  # pointer -> scorer; the two last ones

    def scorer(self) -> typing.Any:
        """Returns the scorer of the current version."""
        return self._scorer

    def poll(self) -> None:
        """Looks at `current.json` and changes the version if it has changed; never raises."""
        try:
            pointer = self._read_pointer()
        except NotReadableNow as error:  # the next poll may read it
            log.warning("%s; version %s goes on", error, self._scorer.version)
            return
        if pointer == self._pointer:
            return
        if not pointer:
            log.error("%s cannot be read; version %s goes on", self.root / CURRENT_NAME, self._scorer.version)
            self._pointer = pointer
            return
        scorer, outcome = self._known.get(pointer), "rolled back"
        if scorer is None:
            try:
                with self._one_at_a_time:
                    scorer, outcome = self._load(self.root), "loaded"
            except Exception as error:  # a version may be damaged in any way; the server must outlive it
                log.error("not loaded, version %s goes on: %s", self._scorer.version, error, exc_info=error)
                if not why_passing(error):
                    self._pointer = pointer  # not tried again before the file changes
                self._on_change("failed", self._scorer)
                return
        before = self._scorer
        self._scorer, self._pointer = scorer, pointer
        kept = [(key, value) for key, value in self._known.items() if value is before]
        self._known = dict([*kept, (pointer, scorer)])
        log.info("version %s, was %s (%s)", scorer.version, before.version, outcome)
        self._on_change(outcome, scorer)

    def watch(self, stopped: threading.Event, interval_s: float) -> threading.Thread:
        """Starts a thread that polls until `stopped`, at low priority where the system has one per thread."""

        def run() -> None:
            with contextlib.suppress(OSError, AttributeError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            while not stopped.wait(interval_s):
                self.poll()

        thread = threading.Thread(target=run, name="reload", daemon=True)
        thread.start()
        return thread

    def _read_pointer(self) -> bytes:
        try:
            pointer = read_bytes(self.root / CURRENT_NAME)
        except ArtefactError:
            return b""
        with contextlib.suppress(ArtefactError):  # most artefacts have no counters
            pointer += read_bytes(self.root / POINTER_NAME)  # new counters are loaded like a new version
        return pointer
