"""Judges a fit: differences with intervals, one sentence, and what to try next. Reads scores, runs nothing."""

import collections.abc
import dataclasses
import math
import typing

import numpy as np

from gpsd_dist.baselines.registry import REFIT
from gpsd_dist.fit.data_check import Facts
from gpsd_dist.metrics.auc_interval import AucByUser, auc_by_user
from gpsd_dist.metrics.scores import Columns

ENOUGH_UNKNOWN = 0.2  # share of test candidates of unknown items from which on attributes are advised (untuned)
SHORT_HISTORY = 3.0  # events, below which a sequence model has little to read (untuned)
FEW_POSITIVES = 10_000  # to train on, below which a tower has less to go by than trees with hand-made counts (untuned)
SMALLEST = "l1h32a4"  # file of configs/model
FEW_EVENTS = 5.0  # of pretraining per item, below which its row is hardly trained (untuned)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Holds one line of the table."""

    label: str
    kind: str
    """floor | floor_refit | model | refit; a refit was made on train + valid"""
    valid_auc: dict[str, float | None]  # by task
    test: dict[str, dict[str, typing.Any]]  # task -> metrics
    scores: dict[str, Columns]  # of test, by task
    strategy: str = ""
    model: str = ""
    weights: int = 0
    """Trained numbers outside of tables; 0 of a floor."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """Holds the AUC of an entry on test by user; None where it is not defined."""

    entry: Entry
    auc: AucByUser | None


def judge(entries: collections.abc.Iterable[Entry], task: str) -> list[Judged]:
    """Computes every entry's AUC on test with the influence of each user."""
    judged = []
    for entry in entries:
        rows = entry.scores.get(task)
        try:
            auc = None if rows is None else auc_by_user(rows["score"], rows["label"], rows["user_hash"])
        except ValueError:  # one class alone: the table says so by its missing number
            auc = None
        judged.append(Judged(entry, auc))
    return judged


def strongest_floor(judged: collections.abc.Sequence[Judged], *, of_refit: bool = False) -> Judged | None:
    """Finds the floor with the largest AUC on test, the one that is hardest to beat.

    `of_refit`: for a refit, which saw `valid` too, as the refitted trees did: they stand for the trees then. Rates and
    popularity have one form, which counts all that is before the split.
    """
    again = {one.entry.label.removesuffix(REFIT) for one in judged if one.entry.kind == "floor_refit"}
    plain = [one for one in judged if one.entry.kind == "floor" and not (of_refit and one.entry.label in again)]
    floors = plain + [one for one in judged if one.entry.kind == "floor_refit" and of_refit]
    return max((one for one in floors if one.auc is not None), key=lambda one: one.auc.auc, default=None)


def verdict(
    task: str, best: Judged | None, judged: collections.abc.Sequence[Judged], facts: Facts, *, is_short: bool = False
) -> str:
    """Says in one sentence whether the chosen model is better than what needs no model.

    `is_short`: a time budget ended trainings.
    """
    if best is None:
        return "No model was trained, so there is nothing to judge: give a larger --budget_minutes."
    if best.auc is None:
        label_N = best.entry.scores[task]["label"] if task in best.entry.scores else np.zeros(0)
        counts = f"{int(label_N.sum()):,} of {len(label_N):,} scored candidates of test have {task} = 1"
        return f"{task} cannot be judged: {counts}, and an AUC needs both classes; a longer test period may hold them."
    is_refit = best.entry.kind == "refit"
    floor = strongest_floor(judged, of_refit=is_refit)
    if floor is None or floor.auc is None:
        return f"{best.entry.label} has a {task} AUC of {_with_width(best.auc)} on test; no floor could be computed."
    difference, half_width = best.auc.minus(floor.auc)
    names = best.entry.label, floor.entry.label
    values = f"{task} AUC on test {best.auc.auc:.4f} against {floor.auc.auc:.4f}"
    values += "; refit: trained again on train + valid" if is_refit else ""
    if math.isnan(half_width) or abs(difference) <= half_width:
        differ = f"differ by {_signed(difference, half_width)}"
        return f"Cannot tell: {names[0]} and {names[1]} {differ}, which may be chance ({values})."
    if difference > 0:
        return f"{names[0]} is {_signed(difference, half_width, sign=False)} above {names[1]} ({values})."
    others = [one for one in judged if one.entry.kind == "model" and one.auc is not None]
    plain = strongest_floor(judged)
    nothing = plain is None or all(one.auc.auc < plain.auc.auc for one in others)
    who = f"Nothing here beats {names[1]}" if nothing else f"What valid chose does not beat {names[1]}"
    below = f"{names[0]} is {_signed(-difference, half_width, sign=False)} below"
    return f"{who}: {below} ({values}); look at {_suspect(facts, best.entry, is_short)}."


def _signed(difference: float, half_width: float, *, sign: bool = True) -> str:
    digits = 3 if half_width >= 0.002 else 4
    return f"{difference:{'+' if sign else ''}.{digits}f} +- {half_width:.{digits}f}"


def _with_width(auc: AucByUser) -> str:
    return _signed(auc.auc, auc.half_width, sign=False)


def _suspect(facts: Facts, best: Entry, is_short: bool) -> str:
    """Names the most likely reason why a sequence model is no better than counting."""
    if is_short:
        return "the time that it got: --budget_minutes ended trainings early"
    train, test = facts.splits["train"], facts.splits["test"]
    if train.history < SHORT_HISTORY:
        return f"the histories ({train.history:.1f} events on average: little to learn a taste from)"
    items = f"the items ({test.unknown:.0%} of the test candidates are new)"
    if test.unknown > ENOUGH_UNKNOWN and not _attributes(facts):
        return f"{items}: give them attributes, section [items]"
    if test.unknown > ENOUGH_UNKNOWN and train.positives >= FEW_POSITIVES:
        return f"{items}: give them more attributes, section [items]"
    if train.positives < FEW_POSITIVES:
        fewer = "" if best.model == SMALLEST else f", or try fewer weights: --models {SMALLEST}"
        counts = f"{train.positives:,} positives for {best.weights:,} weights"
        return f"the amount of data: {counts}. Use the floor until the log is longer{fewer}"
    return "the curves in the report, and at what the histories hold"


def _attributes(facts: Facts) -> list[str]:
    """Names the features of candidates besides the item itself."""
    return [f.name for f in facts.manifest.features_in("candidate") if f.name != facts.manifest.item_feature]


def hints(
    task: str, best: Judged | None, judged: collections.abc.Sequence[Judged], facts: Facts
) -> collections.abc.Iterator[str]:
    """Yields what to try next, the most promising first."""
    floor = strongest_floor(judged, of_refit=best is not None and best.entry.kind == "refit")
    train, test = facts.splits["train"], facts.splits["test"]
    if best is not None and best.auc is not None and floor is not None and floor.auc is not None:
        difference, half_width = best.auc.minus(floor.auc)
        if abs(difference) <= half_width and abs(difference) > 1e-4:
            times = (half_width / abs(difference)) ** 2
            wanted = f"{times:.1f} times as many users" if times < 100 else "far more users"
            wanted = wanted if times >= 1.1 else "a few more users"
            yield f"a difference as small as this one takes {wanted} in test (now {test.users:,}) to be seen"
        if difference < 0 and not any(f.counts and not f.prior_exposures for f in facts.manifest.features):
            yield (
                "nothing counts earlier events: where the log has times, build the data with --counts 7d,30d,total and "
                "fit with --gin.ModelConfig.number_buckets=True"
            )
    if best is not None:
        yield from _transfer(best.entry.model, judged, task)
    if train.history < SHORT_HISTORY:
        yield f"histories have {train.history:.1f} events on average: does [history] hold all behaviour?"
    if test.unknown > ENOUGH_UNKNOWN:
        add = "add more attributes" if _attributes(facts) else "add attributes"
        yield f"{test.unknown:.0%} of the test candidates are items that training never saw: {add} in [items]"
    items = facts.manifest.table(facts.manifest.feature(facts.manifest.item_feature).table).num_rows
    events = sum(split.num_history_tokens for split in facts.manifest.splits if split.name == "pretrain")
    if facts.can_pretrain and events / items < FEW_EVENTS:
        yield f"pretraining has {events / items:.1f} events per item: a longer log, or min_count, gives better rows"
    if not _attributes(facts):
        yield "the log describes candidates by their id alone: attributes (category, brand, price) usually help"
    yield "another --seed with another --out shows how much of a difference is luck of the training"
    yield "other models: --models l4h64a4,hstu,din (finished ones are kept)"


def _transfer(model: str, judged: collections.abc.Sequence[Judged], task: str) -> collections.abc.Iterator[str]:
    """Yields what the best transfer of a model, by valid, gives over the same model from scratch."""
    runs = [one for one in judged if one.entry.kind == "model" and one.entry.model == model and one.auc is not None]
    scratch = next((one.auc for one in runs if one.entry.strategy == "NT"), None)
    transferred = [one for one in runs if one.entry.strategy != "NT"]
    if scratch is None or not transferred:
        return
    one = max(transferred, key=lambda one: one.entry.valid_auc.get(task) or 0.0)
    if one.auc is not None:
        difference, half_width = one.auc.minus(scratch)
        gain = f"what pretraining gives: {one.entry.strategy} - NT = {_signed(difference, half_width)}"
        yield gain + ("" if abs(difference) > half_width else ", within chance")
