"""Lists the checkpoints in a folder, and tells which one is the best and which may be deleted."""

import contextlib
import json
import logging
import re
import typing

from gpsd_dist.checkpoint import storage
from gpsd_dist.checkpoint.integrity import STATE_NAME as STATE_NAME
from gpsd_dist.checkpoint.integrity import read_checksums
from gpsd_dist.checkpoint.storage import Location

log = logging.getLogger(__name__)
FOLDER_NAME = "checkpoints"
DAMAGED_NAME = "run_state.json.damaged"
BEST_NAME = "best.json"
_FOLDER = re.compile(r"step_(\d{8})(?:\.(\d+))?")


def folder_name(step: int, attempt: int = 0) -> str:
    """Names the folder of a step's checkpoint. A step saved again gets a higher attempt: no folder is written twice."""
    return f"step_{step:08d}" + f".{attempt}" * (attempt > 0)


def place_of(path: Location) -> tuple[int, int] | None:
    """Reads (step, attempt) from the name of a folder; None if it is not the name of a checkpoint."""
    match = _FOLDER.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def step_folders(folder: Location) -> list[Location]:
    """Lists all folders with the name of a checkpoint, complete or not, by step and attempt."""
    if not folder.is_dir():
        return []
    named = [(place, path) for path in folder.iterdir() if (place := place_of(path))]
    return [path for _, path in sorted(named, key=lambda entry: entry[0])]


def complete(folder: Location) -> list[Location]:
    """Lists the complete checkpoints by ascending step. Of a step that was saved twice, only the later one."""
    newest: dict[int, Location] = {}
    for path in step_folders(folder):
        place = place_of(path)
        if place is not None and (path / STATE_NAME).is_file():
            newest[place[0]] = path
    return list(newest.values())


def best(folder: Location) -> Location | None:
    """Returns the best checkpoint that is there, None if no step is known as the best.

    The newest checkpoint knows the best step, so one rename publishes both. `best.json` repeats it, for people and for
    checkpoints of other versions.
    """
    there = _by_step(folder)
    return next((there[step] for step in _best_steps(folder, there) if step in there), None)


def lost_best(folder: Location) -> str | None:
    """Names the best checkpoint if it is gone; None if it is there, or nothing was validated yet."""
    there = _by_step(folder)
    step = next(_best_steps(folder, there), None)
    return folder_name(step) if step is not None and step not in there else None


def _by_step(folder: Location) -> dict[int, Location]:
    return {place[0]: path for path in complete(folder) if (place := place_of(path))}


def _best_steps(folder: Location, there: dict[int, Location]) -> typing.Iterator[int]:
    """Yields the best step by the newest checkpoint, then by `best.json`, where they name one."""
    for newest in list(there.values())[-1:]:
        progress = None
        with contextlib.suppress(ValueError):  # damaged: loading it will say so
            progress = storage.read_json(newest / STATE_NAME).get("progress")
        yield from _known(progress.get("best_step") if isinstance(progress, dict) else None)
    path = folder / BEST_NAME  # only read, and warned of, if the checkpoint was not enough
    if path.is_file():
        try:
            step = storage.read_json(path).get("step")
        except ValueError:
            step = None
        if not isinstance(step, int):
            log.warning("%s is damaged and ignored", path)
        yield from _known(step)


def _known(step: typing.Any) -> typing.Iterator[int]:
    if isinstance(step, int) and step >= 0:
        yield step


def write_best(folder: Location) -> None:
    """Brings `best.json` up to date with `best`. Writes nothing if it is."""
    checkpoint, path = best(folder), folder / BEST_NAME
    if checkpoint is None:
        if path.is_file():
            path.unlink()
        return
    try:
        state = storage.read_json(checkpoint / STATE_NAME)
    except ValueError as error:
        log.warning("%s is left as it is: %s", path, error)
        return
    content = json.dumps({"step": state.get("step"), "metrics": state.get("metrics")}).encode()
    if not path.is_file() or storage.read_bytes(path, storage.MAX_JSON_BYTES) != content:
        storage.write(path, content)


def removable(folder: Location, keep_last: int, keep_every_hours: float) -> list[Location]:
    """Lists what may be deleted: all but the newest `keep_last`, the best and one per `keep_every_hours`.

    Unfinished folders go too if they are older than the newest checkpoint; a later one may be under way. A damaged
    checkpoint that was set aside stays, for a person to look at.
    """
    done = complete(folder)
    kept = {*done[-keep_last:], *_every(done, keep_every_hours)}
    if (chosen := best(folder)) is not None:
        kept.add(chosen)
    gone = []
    for path in step_folders(folder):
        place, newest = place_of(path), place_of(done[-1]) if done else None
        is_older = place is not None and newest is not None and place < newest
        if path not in kept and is_older and not (path / DAMAGED_NAME).is_file():
            gone.append(path)
    return gone


def _every(checkpoints: list[Location], hours: float) -> list[Location]:
    """Chooses the first checkpoint, then each one written at least `hours` after the last chosen.

    Deleting those that were not chosen does not change the choice. After the clock was set back, the next checkpoint is
    chosen, and hours count from there.
    """
    chosen: list[Location] = []
    last_s = -float("inf")
    for path in checkpoints if hours > 0 else []:
        try:
            checksums = read_checksums(path)
        except ValueError:
            continue  # damaged, or of a newer version
        if checksums is not None and not last_s <= checksums.time_s < last_s + 3600 * hours:
            chosen.append(path)
            last_s = checksums.time_s
    return chosen
