"""Reads run folders that `gpsd_dist.train` and `gpsd_dist.evaluate` wrote into `Run` objects. Judges nothing.

A report must not fail because one file of one run is missing or broken: whatever cannot be read becomes a sentence in
`Run.problems`, and the rest is used. Needs neither torch nor the data.
"""

import dataclasses
import json
import math
import os
import pathlib
import typing

from gpsd_dist.checkpoint import retention
from gpsd_dist.checkpoint.retention import BEST_NAME, STATE_NAME
from gpsd_dist.checkpoint.retention import FOLDER_NAME as CHECKPOINTS_NAME
from gpsd_dist.metrics import breakdown
from gpsd_dist.report.tables import listed

METRICS_NAME = "metrics.jsonl"
CONFIG_NAME = "run_config.json"
ENVIRONMENT_NAME = "environment.json"
GIN_NAME = "config.gin"
PLAN_NAME = "plan.txt"
OUTCOME_NAME = "outcome.json"
_OF_TOOLS = ("parameters.json", "wall_s.json", "experiment.json", OUTCOME_NAME)
"""Files of a run folder that are no results: of gpsd_dist.scaling, benchmarks.model_table, benchmarks.experiments."""
NOT_JSON = "not JSON, left out"

Scores = dict[str, dict[str, float]]  # task -> metric -> value; NaN where the file says null
Breakdowns = dict[str, dict[str, typing.Any]]  # task -> "half_width", "calibration", "groups", with floats for numbers


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds the files of one run folder. Missing parts are empty, and named in `problems`."""

    folder: pathlib.Path
    label: str  # shortest path that tells it from the other runs of the report
    config: dict[str, typing.Any]
    environment: dict[str, typing.Any]
    plan: str
    entries: tuple[dict[str, float], ...]
    """Lines of `metrics.jsonl` in their order: "step", "epoch", "wall_time_s" and metrics; NaN where it says null."""
    best_step: int | None
    best_metrics: dict[str, float]  # "<task>/<metric>" of the validation at the best step
    scores: dict[str, Scores]  # split -> what `gpsd_dist.evaluate --metrics_out <split>.json` wrote
    breakdowns: dict[str, Breakdowns]  # split -> task -> what `metrics.breakdown` made; none of files before it
    outcome: dict[str, typing.Any]  # `outcome.json`: why it ended, floors on valid; {} of an older or unfinished run
    state: dict[str, typing.Any]  # `run_state.json` of the newest checkpoint
    problems: tuple[str, ...]

    def series(self, name: str, x: str = "step") -> list[tuple[float, float]]:
        """Lists (x, value) of every entry with that metric; x is "step" or "epoch"."""
        return [(entry[x], entry[name]) for entry in self.entries if name in entry and x in entry]

    def names(self) -> list[str]:
        """Lists every metric that occurs in `entries`, sorted."""
        return sorted({name for entry in self.entries for name in entry if "/" in name})

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of an epoch, by the last entry; None if nothing was logged."""
        last = next((e for e in reversed(self.entries) if e.get("epoch", 0) > 0), None)
        return last["step"] / last["epoch"] if last else None

    @property
    def is_stopped_early(self) -> bool:
        """Whether patience ended the run."""
        train, progress = self.config.get("train"), self.state.get("progress", {})
        patience = train.get("patience") if isinstance(train, dict) else 0
        stale = progress.get("stale")
        is_known = isinstance(patience, int) and isinstance(stale, int)
        return bool(self.is_finished) and is_known and 0 < patience <= stale

    @property
    def is_finished(self) -> bool | None:
        """Whether the newest checkpoint is of a finished run; None without one."""
        return self.state.get("progress", {}).get("is_finished")


def find_runs(places: typing.Sequence[pathlib.Path]) -> tuple[list[pathlib.Path], list[str]]:
    """Finds run folders in and below `places`, sorted by path; and says which folders only look like one.

    ValueError for a place that is no folder or holds no run.
    """
    found: dict[str, pathlib.Path] = {}
    problems = []
    for place in places:
        if not place.is_dir():
            raise ValueError(f"{place} is not a folder; expected a run folder of gpsd_dist.train, or a folder of some")
        runs, unlogged, num_folders = _search(place)
        if not runs:
            raise ValueError(
                f"{place} holds no run: looked for {METRICS_NAME} in it and in {num_folders - 1} folders below it"
                + (f"; there is a {CONFIG_NAME} only in {listed(list(map(str, unlogged)))}" if unlogged else "")
                + "; python -m gpsd_dist.train writes one into its OUTPUT_DIR at the first log step"
            )
        for folder in runs:
            found.setdefault(os.path.realpath(folder), folder)
        problems += [
            f"{folder}: {CONFIG_NAME} but no {METRICS_NAME}; nothing was logged, left out" for folder in unlogged
        ]
    return sorted(found.values()), list(dict.fromkeys(problems))


def _search(place: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path], int]:
    """Returns folders with metrics, folders with a configuration only, and the number of folders searched."""
    runs, unlogged, visited = [], [], set()
    for root, folders, files in os.walk(place, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link back to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name != CHECKPOINTS_NAME)
        if METRICS_NAME in files:
            runs.append(pathlib.Path(root))
        elif CONFIG_NAME in files:
            unlogged.append(pathlib.Path(root))
    return runs, unlogged, len(visited)


def read_runs(folders: typing.Sequence[pathlib.Path]) -> list[Run]:
    """Reads run folders; labels each by its path below the folder that all share."""
    if len(folders) == 1:
        return [read_run(folders[0], pathlib.Path(os.path.abspath(folders[0])).name)]
    absolute = [os.path.abspath(folder) for folder in folders]
    common = os.path.commonpath(absolute)
    labels = [pathlib.PurePath(os.path.relpath(path, common)).as_posix() for path in absolute]
    labels = [pathlib.PurePath(common).name if label == "." else label for label in labels]
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def read_run(folder: pathlib.Path, label: str) -> Run:
    """Reads one run folder."""
    problems: list[str] = []
    config = _json_object(folder / CONFIG_NAME, problems)
    checkpoints, elsewhere = _checkpoint_folder(folder, config)
    problems += elsewhere
    scores, breakdowns = _scores(folder, problems)
    best_step, best_metrics = _best(checkpoints / BEST_NAME, problems) if checkpoints else (None, {})
    if not (folder / GIN_NAME).is_file():
        problems.append(f"{folder / GIN_NAME} is missing")
    return Run(
        folder=folder,
        label=label,
        config=config,
        environment=_json_object(folder / ENVIRONMENT_NAME, problems),
        plan=_text(folder / PLAN_NAME, problems).strip(),
        entries=_entries(folder / METRICS_NAME, problems),
        best_step=best_step,
        best_metrics=best_metrics,
        scores=scores,
        breakdowns=breakdowns,
        outcome=_json_object(folder / OUTCOME_NAME, problems) if (folder / OUTCOME_NAME).exists() else {},
        state=_newest_state(checkpoints, problems) if checkpoints else {},
        problems=tuple(problems),
    )


def _checkpoint_folder(folder: pathlib.Path, config: dict[str, typing.Any]) -> tuple[pathlib.Path | None, list[str]]:
    """Returns the folder of the run's checkpoints; None and a problem for a URL, which a report does not fetch."""
    train = config.get("train")
    elsewhere = train.get("checkpoint_dir") if isinstance(train, dict) else None
    if not isinstance(elsewhere, str) or not elsewhere:
        return folder / CHECKPOINTS_NAME, []
    if "://" in elsewhere:
        return None, [f"{folder}: its checkpoints are in {elsewhere}, not read here: best step and state are left out"]
    return pathlib.Path(elsewhere) / CHECKPOINTS_NAME, []


def _text(path: pathlib.Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(f"{path} is missing")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path} cannot be read ({error})")
    return ""


def _json_object(path: pathlib.Path, problems: list[str]) -> dict[str, typing.Any]:
    """Reads the JSON object in that file; {} and a problem if there is none."""
    known = len(problems)
    text = _text(path, problems)
    if len(problems) > known:
        return {}
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        problems.append(f"{path} is not valid JSON ({error})")
        return {}
    if not isinstance(value, dict) or not value:
        problems.append(f"{path} holds {json.dumps(value)[:20]}, expected an object with entries")
        return {}
    return value


def _number(value: typing.Any) -> float | None:
    """Returns a float, NaN for null (which stands for a value that is not finite), None for anything else."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbers(raw: typing.Mapping[str, typing.Any], where: str, problems: list[str]) -> dict[str, float]:
    """Keeps entries of `raw` that are numbers or null; the others become one problem."""
    numbers = {name: _number(value) for name, value in raw.items()}
    wrong = sorted(name for name, value in numbers.items() if value is None)
    if wrong:
        problems.append(f"{where}: {listed(wrong)} should be a number or null, left out")
    return {name: value for name, value in numbers.items() if value is not None}


def _entries(path: pathlib.Path, problems: list[str]) -> tuple[dict[str, float], ...]:
    entries = []
    lines = _text(path, problems).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            raw = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            is_cut = number == len(lines) and not line.endswith("\n")
            problems.append(f"{where} is " + ("cut off: the run was writing it" if is_cut else NOT_JSON))
            continue
        entry = _numbers(raw, where, problems) if isinstance(raw, dict) else {}
        if not math.isfinite(entry.get("step", math.nan)):
            problems.append(f"{where} is not an entry of a run (no step), left out")
            continue
        entries.append(entry)
    counts: dict[str, int] = {}
    for entry in entries:
        for name, value in entry.items():
            counts[name] = counts.get(name, 0) + (not math.isfinite(value))
    not_finite = [f"{name} ({count} x)" for name, count in sorted(counts.items()) if count]
    if not_finite:
        problems.append(f"{path}: not finite: {listed(not_finite)}")
    return tuple(entries)


def _best(path: pathlib.Path, problems: list[str]) -> tuple[int | None, dict[str, float]]:
    raw = _json_object(path, problems)
    if not raw:
        return None, {}
    step, metrics = raw.get("step"), raw.get("metrics")
    if not isinstance(step, int) or isinstance(step, bool) or not isinstance(metrics, dict):
        problems.append(f'{path} should hold "step" (a whole number) and "metrics" (an object)')
        return None, {}
    return step, _numbers(metrics, str(path), problems)


def _scores(folder: pathlib.Path, problems: list[str]) -> tuple[dict[str, Scores], dict[str, Breakdowns]]:
    """Reads every other JSON file of the folder as a result of `gpsd_dist.evaluate`; its stem names the split."""
    scores: dict[str, Scores] = {}
    breakdowns: dict[str, Breakdowns] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name in (CONFIG_NAME, ENVIRONMENT_NAME, *_OF_TOOLS):
            continue
        known = len(problems)
        raw = _json_object(path, problems)
        if len(problems) > known:
            continue
        if not all(isinstance(values, dict) for values in raw.values()):
            problems.append(
                f'{path} is not a result of gpsd_dist.evaluate ({{"task": {{"metric": number}}}}), left out'
            )
            continue
        scores[path.stem], breakdowns[path.stem] = read_scores(raw, str(path), problems)
    return scores, breakdowns


def read_scores(raw: dict[str, typing.Any], where: str, problems: list[str]) -> tuple[Scores, Breakdowns]:
    """Splits what `evaluate` wrote into the metrics and the breakdowns of its tasks."""
    scores: Scores = {}
    found: Breakdowns = {}
    for task, values in raw.items():
        numbers = {name: value for name, value in values.items() if name != breakdown.KEY}
        scores[task] = _numbers(numbers, f"{where}, {task}", problems)
        try:
            if breakdown.KEY in values:
                found[task] = _breakdown(values[breakdown.KEY])
        except (TypeError, ValueError, KeyError, AttributeError):
            problems.append(
                f"{where}, {task}: {breakdown.KEY} has another form than gpsd_dist.evaluate writes, left out"
            )
    return scores, found


def _breakdown(raw: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Turns null into NaN; what has another form raises."""

    def numbers(values: dict[str, typing.Any], *needed: str) -> dict[str, float]:
        found = {name: math.nan if value is None else float(value) for name, value in values.items() if name != "name"}
        if not set(needed) <= set(found):
            raise ValueError(f"{set(needed) - set(found)} is missing")
        return found

    of_group = ("rows", "positives", "auc", "auc_half_width")
    groups = {
        what: [{"name": str(one["name"])} | numbers(one, *of_group) for one in group]
        for what, group in raw["groups"].items()
    }
    calibration = [numbers(one, "rows", "predicted", "observed") for one in raw["calibration"]]
    return {"half_width": numbers(raw["half_width"]), "calibration": calibration, "groups": groups}


def _newest_state(folder: pathlib.Path, problems: list[str]) -> dict[str, typing.Any]:
    """Reads `run_state.json` of the last complete checkpoint; {} and a problem if there is none."""
    complete = retention.complete(folder)
    if not complete:
        problems.append(f"{folder} has no complete checkpoint (step_*/{STATE_NAME})")
        return {}
    newest = folder / complete[-1].name / STATE_NAME
    state = _json_object(newest, problems)
    for name in ("progress", "manifest"):
        if name in state and not isinstance(state[name], dict):
            problems.append(f"{newest}: {name} is not an object, left out")
            del state[name]
    return state
