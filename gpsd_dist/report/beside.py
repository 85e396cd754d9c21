"""Finds what belongs to a report but is no run: floors, outcomes of `fit`, files of `predict`, serving benchmarks."""

import dataclasses
import json
import os
import pathlib
import typing

from gpsd_dist.baselines.registry import WORDS
from gpsd_dist.report.run_folder import CHECKPOINTS_NAME, Breakdowns, Run, Scores, read_scores

FLOORS_NAME = "floors"
"""`<folder of runs>/floors/<baseline>/<split>.json` holds what `evaluate --baseline <baseline>` gives on a split."""
FIT_NAME = "summary.json"
DAILY_NAME = "daily.json"  # what `fit --daily` found
_STATE_NAME = "fit.json"  # what a fit was begun with
_MOST_BYTES = 2**20  # of a file that may be a serving benchmark
PREDICTIONS_NAME = "predictions.json"  # predict.output.SUMMARY_NAME


@dataclasses.dataclass(frozen=True)
class Floor:
    """Holds the scores of a baseline, which needs no model."""

    name: str
    folder: pathlib.Path | None  # above `floors`; None: of the outcome of a run
    scores: dict[str, Scores]  # by split
    breakdowns: dict[str, Breakdowns]

    @property
    def label(self) -> str:
        return WORDS.get(self.name, self.name)


@dataclasses.dataclass(frozen=True)
class Beside:
    """Holds everything that was found, and sentences about what could not be read."""

    floors: tuple[Floor, ...]
    fits: tuple[tuple[pathlib.Path, dict[str, typing.Any]], ...]
    daily: tuple[tuple[pathlib.Path, dict[str, typing.Any]], ...]
    predictions: tuple[tuple[pathlib.Path, dict[str, typing.Any]], ...]
    serving: tuple[tuple[pathlib.Path, dict[str, typing.Any]], ...]
    problems: tuple[str, ...]


_Found = dict[str, tuple[pathlib.Path, dict[str, typing.Any]]]  # real path -> path, content


def find_beside(places: typing.Sequence[pathlib.Path]) -> Beside:
    """Searches in and below `places`, and for floors in the folders right above them, too."""
    problems: list[str] = []
    floors: dict[str, Floor] = {}
    fits: _Found = {}
    daily: _Found = {}
    predictions: _Found = {}
    serving: _Found = {}
    for folder in _folders(places):
        if folder.name == FLOORS_NAME:
            for name in sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name in WORDS):
                floors.setdefault(os.path.realpath(folder / name), _floor(folder, name, problems))
        if (summary := _read(folder / FIT_NAME, problems)) and isinstance(summary.get("verdicts"), dict):
            fits[os.path.realpath(folder)] = folder, summary
        if record := _daily(folder, problems):
            daily[os.path.realpath(folder)] = folder, record
        if summary := _read(folder / PREDICTIONS_NAME, problems):
            predictions[os.path.realpath(folder)] = folder, summary
        for path in sorted(folder.glob("*.json")):
            measured = _read(path, []) if path.is_file() and path.stat().st_size < _MOST_BYTES else {}
            if {"scenario", "history", "candidates", "machine_load"} <= set(measured):
                serving[os.path.realpath(path)] = path, measured
    return Beside(
        _sorted(floors), _sorted(fits), _sorted(daily), _sorted(predictions), _sorted(serving), tuple(problems)
    )


def _sorted(found: dict[str, typing.Any]) -> tuple[typing.Any, ...]:
    return tuple(found[path] for path in sorted(found))


def _folders(places: typing.Sequence[pathlib.Path]) -> typing.Iterator[pathlib.Path]:
    for place in places:
        above = place.absolute().parent / FLOORS_NAME
        if above.is_dir():
            yield above
        for root, names, _ in os.walk(place):
            names[:] = sorted(name for name in names if name != CHECKPOINTS_NAME)
            yield pathlib.Path(root)


def _read(path: pathlib.Path, problems: list[str]) -> dict[str, typing.Any]:
    """Reads a JSON object; {} where there is no such file, and a problem where it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} cannot be read ({error}), left out")
        return {}
    return value if isinstance(value, dict) else {}


def _daily(folder: pathlib.Path, problems: list[str]) -> dict[str, typing.Any]:
    """Reads what `fit --daily` found; {} and a problem where it is broken, or was begun and never judged."""
    path, known = folder / DAILY_NAME, len(problems)
    record = _read(path, problems)
    options = _read(folder / _STATE_NAME, []).get("options")
    if path.is_file() and not record and len(problems) == known:
        problems.append(f"{path} holds nothing that fit --daily writes, left out")
    elif not path.is_file() and isinstance(options, dict) and options.get("daily"):
        problems.append(
            f"{path} is missing: this fit --daily was stopped before it judged its days; the same command goes on"
        )
    return record


def _floor(folder: pathlib.Path, name: str, problems: list[str]) -> Floor:
    scores, breakdowns = {}, {}
    for path in sorted((folder / name).glob("*.json")):
        raw = _read(path, problems)
        if raw and all(isinstance(values, dict) for values in raw.values()):
            scores[path.stem], breakdowns[path.stem] = read_scores(raw, str(path), problems)
    return Floor(name, folder.parent, scores, breakdowns)


def floors_of(runs: typing.Sequence[Run], floors: typing.Sequence[Floor], problems: list[str]) -> list[Floor]:
    """Lists the floors that were scored on the rows of these runs: from files, else from the outcomes of the runs."""
    found: dict[str, Floor] = {}
    for floor in floors:
        above = os.path.realpath(floor.folder or "")
        if any(f"{os.path.realpath(run.folder)}{os.sep}".startswith(f"{above}{os.sep}") for run in runs):
            kept = {split: floor.scores[split] for split in floor.scores if not _differs(floor, split, runs, problems)}
            if kept and floor.name not in found:
                found[floor.name] = dataclasses.replace(floor, scores=kept)
    for run in runs:
        for key, value in _floors_in(run).items():
            name, task, metric = key.split("/", 2)
            floor = found.setdefault(name, Floor(name, None, {}, {}))
            floor.scores.setdefault("valid", {}).setdefault(task, {}).setdefault(metric, float(value))
    return sorted(found.values(), key=lambda floor: list(WORDS).index(floor.name))


def _floors_in(run: Run) -> dict[str, float]:
    floors = run.outcome.get("floors")
    known = floors if isinstance(floors, dict) else {}
    return {k: v for k, v in known.items() if k.count("/") == 2 and k.split("/")[0] in WORDS and isinstance(v, float)}


def _differs(floor: Floor, split: str, runs: typing.Sequence[Run], problems: list[str]) -> bool:
    """Whether a run has other numbers of rows on the split: then the floor is of other data."""
    for run in runs:
        for task, values in floor.scores[split].items():
            at_best = run.best_metrics.get(f"{task}/rows") if split == "valid" else None
            theirs = run.scores.get(split, {}).get(task, {}).get("rows", at_best)
            if theirs is not None and values.get("rows") not in (None, theirs):
                said = f"{values['rows']:,.0f} rows of {task} in {split}, {run.label} {theirs:,.0f}"
                problems.append(f"{floor.folder}/{FLOORS_NAME}/{floor.name} is of other data ({said}), left out")
                return True
    return False
