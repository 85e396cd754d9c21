"""Reads the list of reported results, configs/experiments/expected.json, orders it and judges what is reproduced.

It starts no command; `benchmarks.experiments` does.
"""

import collections.abc
import dataclasses
import json
import math
import pathlib
import re

EXPECTED = pathlib.Path(__file__).resolve().parents[1] / "configs" / "experiments" / "expected.json"
PASS, MISS, FAILED, SKIPPED = "pass", "MISS", "FAILED", "skipped"
RAW_SOURCES = {
    "amazon_grocery": ("amazon_grocery", "--source amazon_grocery"),
    "kuairand_pure": ("kuairand_pure", "--source kuairand_pure"),
    "movietweetings": (
        "movietweetings",
        "--source movielens --max_history_length 200 --vocabulary all_items --no_genres",
    ),
    "movietweetings_ctr": ("movietweetings", "--source movielens --split_rule last_item_by_time"),
}
"""Data -> folder of their raw files below RAW_ROOT, options of data_pipeline.build."""
SYNTHETIC = {
    "synthetic": "",
    # One lasting interest per user, and attributes that say nothing of it: what an item is, only its neighbours in the
    # histories tell. So pretraining helps much, and in seconds.
    "synthetic_small": "--num_users 1500 --num_items 1200 --num_topics 4 --niches_per_topic 4 --requests_per_day 600 "
    "--attribute_noise 1.0 --num_interests 1 --drift_per_week 0",
}
"""Data that are generated -> options of data_pipeline.synthesize."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Describes one run whose result is known."""

    name: str  # <group>/<run>; also its folder below OUT_DIR
    gin_file: str  # from the repository's root
    overrides: tuple[str, ...]  # further arguments of gpsd_dist.train, but for folders
    needs: str | None  # name of the pretraining that it starts from
    data: str  # one of RAW_SOURCES or SYNTHETIC
    split: str
    metric: str  # <task>/<metric>, as gpsd_dist.evaluate writes them
    expected: float  # mean over seeds
    tolerance: float
    """Largest difference that passes: five standard deviations over three seeds (2.8 over the six of the reduced ones),
    at least 0.01. That is a 95 % prediction interval for one more seed; a run on another machine, whose rounding
    differs, is like one."""
    minutes: float  # about how long it takes on one CPU core, after what it needs
    reduced: bool
    refit_of: str | None = None  # name of the experiment that this one repeats on train + valid

    def dependencies(self) -> tuple[str, ...]:
        """Names the experiments that must be finished before this one."""
        return tuple(name for name in (self.needs, self.refit_of) if name)


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds the verdict on an experiment."""

    experiment: Experiment
    verdict: str  # PASS | MISS | FAILED | SKIPPED
    note: str = ""
    found: float | None = None
    minutes: float | None = None


def read_experiments(path: pathlib.Path = EXPECTED) -> list[Experiment]:
    """Reads the list. ValueError names every problem of the file."""
    fields = dataclasses.fields(Experiment)
    known, required = {f.name for f in fields}, {f.name for f in fields if f.default is dataclasses.MISSING}
    experiments, problems = [], []
    for index, entry in enumerate(json.loads(path.read_text())):
        unknown, missing = sorted(entry.keys() - known), sorted(required - entry.keys())
        if unknown or missing:
            problems.append(f"entry {index} ({entry.get('name')}): unknown fields {unknown}, missing fields {missing}")
        else:
            experiments.append(Experiment(**entry | {"overrides": tuple(entry["overrides"])}))
    if not problems:
        problems = [problem for e in experiments for problem in _problems(e, experiments)]
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return experiments


def _problems(e: Experiment, experiments: list[Experiment]) -> collections.abc.Iterator[str]:
    by_name = {other.name: other for other in experiments}
    if sum(other.name == e.name for other in experiments) > 1:
        yield f"{e.name} is there more than once"
    if not re.fullmatch(r"(?!data/|raw/)\w+/\w+", e.name):
        yield f"name {e.name!r} is not <group>/<run>, where the group is neither data nor raw"
    if e.data not in (*RAW_SOURCES, *SYNTHETIC):
        yield f"{e.name}: data {e.data!r} is not one of {[*RAW_SOURCES, *SYNTHETIC]}"
    if not re.fullmatch(r"\w+/[\w@]+", e.metric):
        yield f"{e.name}: metric {e.metric!r} is not <task>/<metric>"
    if not (e.tolerance > 0 and e.minutes > 0):
        yield f"{e.name}: tolerance {e.tolerance} and minutes {e.minutes} must be above 0"
    if e.reduced and e.data not in SYNTHETIC:
        yield f"{e.name} is reduced, but {e.data!r} needs raw files"
    for name in e.dependencies():
        needed = by_name.get(name)
        if needed is None:
            yield f"{e.name} needs {name!r}, which is not listed"
        elif (needed.data, needed.reduced) != (e.data, e.reduced):
            yield f"{e.name} needs {name!r}, which has other data, or only one of them is reduced"
        elif name == e.refit_of and _options(needed) != _options(e):
            yield f"{e.name} is a refit of {name!r}, which has other options"


def _options(e: Experiment) -> tuple:
    return e.gin_file, e.overrides, e.needs


def ordered(experiments: list[Experiment], names: collections.abc.Collection[str]) -> list[Experiment]:
    """Selects the named experiments and all they need, in a working order. ValueError: unknown name, circle."""
    by_name = {experiment.name: experiment for experiment in experiments}
    unknown = sorted(set(names) - by_name.keys())
    if unknown:
        raise ValueError(f"there is no experiment {unknown}; there are {sorted(by_name)}")
    done: dict[str, Experiment] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ValueError(f"experiments need each other in a circle: {' -> '.join((*path, name))}")
        for needed in by_name[name].dependencies():
            visit(needed, (*path, name))
        done.setdefault(name, by_name[name])

    for experiment in experiments:
        if experiment.name in names:
            visit(experiment.name, ())
    return list(done.values())


def judge(experiment: Experiment, metrics: dict, minutes: float, note: str = "") -> Result:
    """Compares what gpsd_dist.evaluate wrote with what is expected. No such metric, or not a number: FAILED."""
    task, name = experiment.metric.split("/")
    found = metrics.get(task, {}).get(name)
    if not isinstance(found, (int, float)) or not math.isfinite(found):
        return Result(experiment, FAILED, f"{experiment.metric} is {found} among {metrics}", minutes=minutes)
    is_near = abs(found - experiment.expected) <= experiment.tolerance
    return Result(experiment, PASS if is_near else MISS, note, found, minutes)


def exit_status(results: list[Result]) -> int:
    """Returns 0 if something was checked and nothing differs; 1: a miss or a failure; 2: nothing was checked."""
    verdicts = {result.verdict for result in results}
    if verdicts & {MISS, FAILED}:
        return 1
    return 0 if PASS in verdicts else 2
