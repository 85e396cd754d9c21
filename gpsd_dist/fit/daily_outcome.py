"""Turns the scores of all days into one table, one sentence, and `daily.json`. Runs nothing.

An AUC over several days is the mean of the days' AUCs: scores of different models are never ranked against each other.
Its interval adds up what each user moves on all days. GAUC, log loss and calibration are of all rows together.
"""

import collections.abc
import dataclasses
import math
import pathlib
import typing

import numpy as np

from gpsd_dist.checkpoint import storage
from gpsd_dist.disk.console import Console
from gpsd_dist.fit.days import Days, name_of
from gpsd_dist.fit.outcome import as_text
from gpsd_dist.fit.steps import FLOOR_NAMES, REFITTED_FLOOR
from gpsd_dist.metrics.auc_interval import AucByUser, auc_by_user
from gpsd_dist.metrics.classification import classification_metrics
from gpsd_dist.metrics.scores import Columns
from gpsd_dist.report.every_day import CAPTION, SCRATCH, WARM, table, width_words
from gpsd_dist.report.tables import Table

FLOORS = {"popularity": "popularity", "rates": FLOOR_NAMES["rates"], REFITTED_FLOOR: FLOOR_NAMES["gbdt"]}


class Scores(typing.NamedTuple):
    """Holds what a model of one day gave for the days after it."""

    label: str
    day: int  # up to which it was trained
    columns: dict[str, Columns]  # by task
    cpu_s: float | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds what was found."""

    verdict: str
    table: Table
    notes: list[str]
    record: dict[str, typing.Any]  # of daily.json


class _Log:
    """Gives the rows that a model of one day scored on another, for one task, and their metrics."""

    def __init__(self, scores: list[Scores], days: Days, task: str):
        found = {one.label for one in scores}
        self.labels = [label for label in (SCRATCH, WARM, *FLOORS.values()) if label in found]
        self.cpu_s = {(one.label, one.day): one.cpu_s for one in scores}
        self._rows: dict[tuple[str, int, int], Columns] = {}
        for one in scores:
            rows = one.columns.get(task, {"day": np.zeros(0, np.int32)})
            for scored in np.unique(rows["day"]):
                is_of_day = rows["day"] == scored
                self._rows[one.label, one.day, int(scored)] = {name: value[is_of_day] for name, value in rows.items()}
        pairs = list(zip(days.models, days.scored, strict=True))
        self.next_days = [pair for pair in pairs if (SCRATCH, *pair) in self._rows]
        both = [pair for pair in self.next_days if (WARM, *pair) in self._rows]
        self.compared = both or self.next_days
        """Day of a model and the next day, where all kinds of models were scored: the first one has no warm start."""

    def has(self, label: str, pair: tuple[int, int]) -> bool:
        return (label, *pair) in self._rows

    def auc(self, label: str, pairs: collections.abc.Sequence[tuple[int, int]]) -> AucByUser | None:
        """Averages the AUCs of several days, with each user's influence; None where no day has both classes."""
        found = []
        for pair in pairs:
            rows = self._rows[label, *pair]
            if 0 < rows["label"].sum() < len(rows["label"]):
                found.append(auc_by_user(rows["score"], rows["label"], rows["user_hash"]))
        return _mean(found) if found else None

    def metrics(self, label: str, pairs: collections.abc.Sequence[tuple[int, int]]) -> dict[str, float | int]:
        """Computes the metrics of all rows together, but the AUC, which is the mean over days."""
        parts = [self._rows[label, *pair] for pair in pairs]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        kind = "score" if label == FLOORS["popularity"] else "logit"
        made = classification_metrics(rows["score"], rows["label"], rows["user_hash"], kind, rows["day"])
        auc = self.auc(label, pairs)
        return made | {
            "auc": math.nan if auc is None else auc.auc,
            "auc_half_width": math.nan if auc is None else auc.half_width,
        }

    def by_age(self, label: str) -> dict[int, list[tuple[int, int]]]:
        """Lists (day of the model, scored day) by age in days, where a model of the day before was scored as well."""
        found: dict[int, list[tuple[int, int]]] = {}
        for day, scored in sorted(key[1:] for key in self._rows if key[0] == label):
            if self.has(label, (scored - 1, scored)):
                found.setdefault(scored - day, []).append((day, scored))
        return dict(sorted(found.items()))


def _mean(aucs: list[AucByUser]) -> AucByUser:
    """Averages AUCs of several days; a user who is in several of them counts once, with the sum of the influences."""
    users_M = np.concatenate([one.user_hash_U for one in aucs])
    user_hash_U, user_M = np.unique(users_M, return_inverse=True)
    influence_M = np.concatenate([one.influence_U for one in aucs])
    influence_U = np.bincount(user_M, influence_M, minlength=len(user_hash_U)) / len(aucs)
    return AucByUser(float(np.mean([one.auc for one in aucs])), user_hash_U, influence_U)


def make(scores: list[Scores], days: Days, tasks: tuple[str, ...], left_out: list[str]) -> Outcome:
    """Judges all days that were scored; the first task counts."""
    logs = {task: _Log(scores, days, task) for task in tasks}
    first = logs[tasks[0]]
    notes = [f"--budget_minutes ended before {left_out[0]}: the same command goes on with it"] if left_out else []
    if not first.next_days:
        sentence = "No day was scored: give a larger --budget_minutes, the same command goes on."
        return Outcome(sentence, Table((), ()), notes, {"verdict": sentence})
    for day, scored in first.next_days:
        if first.auc(SCRATCH, [(day, scored)]) is None:
            notes.append(
                f"{name_of(scored)} has {tasks[0]} labels of one class alone: it has no AUC, and no mean counts it"
            )
    judged = first.auc(SCRATCH, first.compared)
    if judged is not None and math.isnan(judged.half_width):
        notes.append("the scored rows are of one user, so no interval says how sure a difference is")
    sentence = verdict(first, tasks[0])
    lines = {task: [*_all_days(log), *_by_day(log), *_by_age(log)] for task, log in logs.items()}
    shown = table(tasks[0], [line for line in lines[tasks[0]] if _is_shown(line)])
    return Outcome(sentence, shown, notes, {"verdict": sentence, "notes": notes, "task": tasks[0], "lines": lines})


def _all_days(log: _Log) -> collections.abc.Iterator[dict[str, typing.Any]]:
    for label in log.labels:
        pairs = [pair for pair in log.compared if log.has(label, pair)]
        if pairs:
            used = [used for used in (log.cpu_s[label, day] for day, _ in pairs) if used is not None]
            cpu_s = sum(used) / len(used) if used else None
            about = {"of": "all days", "label": label, "days": len(pairs), "cpu_s": cpu_s}
            yield about | log.metrics(label, pairs)


def _by_day(log: _Log) -> collections.abc.Iterator[dict[str, typing.Any]]:
    for day, scored in log.next_days:
        for label in (label for label in log.labels if log.has(label, (day, scored))):
            about = {"of": "day", "label": label, "trained_to": name_of(day), "day": name_of(scored)}
            yield about | {"cpu_s": log.cpu_s[label, day]} | log.metrics(label, [(day, scored)])


def _by_age(log: _Log) -> collections.abc.Iterator[dict[str, typing.Any]]:
    for label in (SCRATCH, WARM):
        for age, pairs in log.by_age(label).items():
            against = {"auc_lost": math.nan, "auc_lost_half_width": math.nan}
            old, fresh = log.auc(label, pairs), log.auc(label, [(scored - 1, scored) for _, scored in pairs])
            if old is not None and fresh is not None:
                difference, half_width = fresh.minus(old)
                against = {"auc_lost": difference, "auc_lost_half_width": half_width}
            yield (
                {"of": "age", "label": label, "age_days": age, "days": len(pairs)} | against | log.metrics(label, pairs)
            )


def _is_shown(line: dict[str, typing.Any]) -> bool:
    """The terminal gets models and trees of each day; daily.json has everything."""
    return line["of"] != "day" or line["label"] in (SCRATCH, WARM, FLOORS[REFITTED_FLOOR])


def verdict(log: _Log, task: str) -> str:
    """Says in one sentence which way of training is better, whether it beats the floors, and how a model ages."""
    pairs = log.compared
    scratch, warm = log.auc(SCRATCH, pairs), log.auc(WARM, pairs) if log.has(WARM, pairs[0]) else None
    if scratch is None:
        return f"{task} cannot be judged: no scored day has labels of both classes."
    parts, best, label = [], scratch, SCRATCH
    if warm is not None:
        used = [sum(log.cpu_s[name, day] or math.nan for day, _ in pairs) for name in (WARM, SCRATCH)]
        which = _compared(warm, scratch, "not clearly better or worse than", "better than", "worse than")
        parts.append(
            f"going on with yesterday's model is {which} training from scratch ({task} AUC {warm.auc:.4f} against "
            f"{scratch.auc:.4f}, {_difference(warm, scratch)})"
            + ("" if math.isnan(used[0] / used[1]) else f" for {used[0] / used[1]:.0%} of its CPU time")
        )
        best, label = (warm, WARM) if warm.auc >= scratch.auc else (scratch, SCRATCH)
    floors = [(name, log.auc(name, pairs)) for name in FLOORS.values() if all(log.has(name, pair) for pair in pairs)]
    known = [(name, auc) for name, auc in floors if auc is not None]
    if known:
        name, auc = max(known, key=lambda floor: floor[1].auc)
        parts.append(
            f"{label} is {_compared(best, auc, 'not clearly above or below', 'above', 'below')} {name} "
            f"({_difference(best, auc)})"
        )
    ages = [line for line in _by_age(log) if line["label"] == label and line["age_days"] > 1]
    ages = [line for line in ages if not math.isnan(line["auc_lost"])]
    if ages:
        old = max(ages, key=lambda line: (line["days"] > 1, line["age_days"]))
        lost = f"{old['auc_lost']:.4f}{width_words(old['auc_lost_half_width'])}"
        parts.append(
            f"{old['age_days']} days old it has lost {lost} of AUC, and predicts {old['calibration']:.2f} times the "
            "observed rate"
        )
    return f"Over {len(pairs)} day{'s' * (len(pairs) > 1)}: {'; '.join(parts)}."


def _compared(one: AucByUser, other: AucByUser, alike: str, above: str, below: str) -> str:
    difference, half_width = one.minus(other)
    return alike if not abs(difference) > half_width else above if difference > 0 else below


def _difference(one: AucByUser, other: AucByUser) -> str:
    difference, half_width = one.minus(other)
    return f"{difference:+.4f}{width_words(half_width)}"


def show(made: Outcome, out_dir: pathlib.Path) -> None:
    """Prints table, verdict and notes, and writes daily.json into `out_dir`."""
    console = Console()
    console = console if console.is_terminal else Console(width=130)
    if made.table.groups:
        console.print(as_text(made.table))
        console.print(CAPTION)
    console.print(made.verdict, style="bold", soft_wrap=True)
    for note in made.notes:
        console.print(f"- {note}", soft_wrap=True)
    storage.write_json(out_dir / "daily.json", made.record)
    console.print(f"in {out_dir}: daily.json, commands.sh", soft_wrap=True)
