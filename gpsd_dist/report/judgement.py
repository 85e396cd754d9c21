"""Judges the configuration that `valid` would choose: against the strongest floor, with an interval."""

import dataclasses
import math
import shlex
import typing

from gpsd_dist.baselines.registry import NEXT_ITEM
from gpsd_dist.report.beside import FLOORS_NAME, Floor
from gpsd_dist.report.families import Configuration, Family
from gpsd_dist.report.intervals import half_width_of, mean_width, value_of, width_text
from gpsd_dist.report.tables import metric_text

LARGER_IS_BETTER = ("auc", "gauc", "gauc_user_day", "mrr", "hr", "ndcg")
REFITTED, TREES = "gbdt_refit", "gbdt"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Holds one sentence, and whether the configuration is clearly above, below or neither."""

    sentence: str
    kind: str  # "above", "below", "open", "unknown"
    remedy: str = ""  # a command that would say more


def strongest_floor(
    floors: typing.Sequence[Floor], split: str, task: str, metric: str, *, is_refit: bool
) -> Floor | None:
    """Finds the floor with the largest value. For a refit the refitted trees stand for the trees, else they are out."""
    names = {floor.name for floor in floors if value_of(floor, split, task, metric) is not None}
    out = TREES if is_refit and REFITTED in names else "" if is_refit else REFITTED
    known = [(value_of(floor, split, task, metric), floor) for floor in floors if floor.name != out]
    finite = [(value, floor) for value, floor in known if value is not None and math.isfinite(value)]
    return max(finite, key=lambda pair: pair[0])[1] if finite else None


def judge(
    family: Family, chosen: Configuration, floors: typing.Sequence[Floor], split: str, task: str, metric: str, word: str
) -> Judgement:
    """Compares the mean over seeds with the strongest floor, by a metric of LARGER_IS_BETTER; others are only told."""
    values = [value_of(run, split, task, metric) for run in chosen.runs]
    value = sum(v for v in values if v is not None) / len(values)
    width = mean_width([half_width_of(run, split, task, metric) for run in chosen.runs])
    who = f"{chosen.label} has a {split} {word} of {metric_text(metric, value)} {width_text(width)}".rstrip()
    if math.isnan(value):
        return Judgement(
            f"{chosen.label} has no {split} {word}: {task} has labels of one class there, or none.", "unknown"
        )
    if metric.split("@")[0] not in LARGER_IS_BETTER:
        return Judgement(f"{who}.", "unknown")
    floor = strongest_floor(floors, split, task, metric, is_refit=chosen.is_refit)
    if floor is None:
        return Judgement(
            f"{who}. No floor was scored on {split}, so nothing says whether that is good.",
            "unknown",
            _command(family, chosen, split),
        )
    theirs = value_of(floor, split, task, metric)
    floor_width = half_width_of(floor, split, task, metric)
    against = f"{floor.label} ({metric_text(metric, theirs)} {width_text(floor_width)}".rstrip() + ")"
    both = math.hypot(width, math.nan if floor_width is None else floor_width)
    difference = value - theirs
    unpaired = f"{width_text(both)} (unpaired)"  # as if both scores were of other users: docs/report.md
    how_far = f"{abs(difference):.4f}" if math.isnan(both) else f"{abs(difference):.4f} {unpaired}"
    only_weak = {f.name for f in floors if value_of(f, split, task, metric) is not None} <= {"popularity", "rates"}
    remedy = _command(family, chosen, split) if only_weak else ""
    if math.isnan(both):
        side = "above" if difference > 0 else "below"
        return Judgement(f"{who}, {how_far} {side} {against}; how sure that is, is not known.", "unknown", remedy)
    if abs(difference) <= both:
        sentence = f"Cannot tell: {who}, {against} needs no model, and they differ by {difference:+.4f} {unpaired}."
        return Judgement(sentence, "open", remedy)
    if difference > 0:
        return Judgement(f"{who}, {how_far} above {against}, which needs no model.", "above", remedy)
    return Judgement(f"{who}, {how_far} below {against}, which needs no model: use that instead.", "below")


def _command(family: Family, chosen: Configuration, split: str) -> str:
    """Writes the command that scores the strongest floor where the report finds it."""
    run = chosen.runs[0]
    name = NEXT_ITEM if family.stage == "pretrain" else REFITTED if chosen.is_refit else TREES
    out = run.folder.parent / FLOORS_NAME / name / f"{split}.json"
    data = shlex.quote(f"{run.config.get('data_dir', 'DATA')}")
    return f"gpsd-dist evaluate --baseline {name} --data {data} --split {split} --metrics_out {shlex.quote(str(out))}"
