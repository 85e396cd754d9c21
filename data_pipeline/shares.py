"""Counts what a model could learn from: rows, labels and histories of each split, and ids that join.

A data set that is right by the contract can still be useless: no label was ever observed, every history is empty, no
item of the log is in the items file. Such a build ends with an error, unless --allow_empty says that it is meant.
"""

import collections.abc
import pathlib
import typing

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import progress
from gpsd_dist import schema

WARN_BELOW = 0.9  # share of ids that join; untuned
WARN_UNKNOWN = 0.9  # share of ids that training does not know; untuned
FIX = "correct the log or its description, or add --allow_empty if it is meant"


class Labels(typing.NamedTuple):
    """Counts the labels of one task in one split, those of a sample weight of 0 left out."""

    num_observed: int
    num_positive: int


def check(
    root: pathlib.Path, manifest: schema.Manifest, written: collections.abc.Container[str], is_allowed: bool
) -> dict[str, int]:
    """Warns of splits that show nothing; ValueError for what nothing can be learnt from, unless `is_allowed`.

    `written`: the splits that lie in `root` by now. Returns the observed labels of each task in train, if it is there.
    """
    problems, observed = [], {}
    of_weight = " with a weight above 0" if "weight" in manifest.sampling else ""
    for split in manifest.splits:
        if split.name not in written:
            continue
        if not split.num_rows:
            words = f"split {split.name!r} has no rows (split rule: {manifest.split_rule[:200]})"
            problems.append(f"{words}; --no_valid trains without it" if split.name == "valid" else words)
            continue
        if not split.num_history_tokens:
            problems.append(f"all histories of split {split.name!r} are empty: no event comes before its requests")
        tasks, unknown = labels(root, manifest, split)
        for column, share in unknown.items():
            if share > WARN_UNKNOWN and split.name != "train":
                words = f"split {split.name!r}: {share:.0%} of {column} are unknown to training"
                progress.warn(f"{words}; are they spelled as before?")
        for task, found in tasks.items():
            words = f"task {task!r}, split {split.name!r}: {found.num_observed:,} labels{of_weight}, "
            words += f"{found.num_positive:,} positive"
            progress.say(f"  {words}")
            if split.name == "train":
                observed[task] = found.num_observed
            if not found.num_observed and split.name == "train":
                problems.append(f"task {task!r} has 0 observed labels in train{of_weight}: nothing can be learnt of it")
            elif found.num_positive in (0, found.num_observed):
                progress.warn(f"{words}: AUC is not defined there")
    complain(problems, is_allowed)
    return observed


def complain(problems: list[str], is_allowed: bool) -> None:
    """Raises one ValueError for all problems, or warns of them."""
    if problems and not is_allowed:
        raise ValueError(f"{'; '.join(problems)}; {FIX}")
    for problem in problems:
        progress.warn(problem)


def labels(
    root: pathlib.Path, manifest: schema.Manifest, split: schema.Split
) -> tuple[dict[str, Labels], dict[str, float]]:
    """Counts the labels of every task in a written split, and finds the share of unknown ids in columns of candidates.

    Two empty dictionaries for pretrain.
    """
    if split.name == "pretrain":
        return {}, {}
    names = {task.name: f"label.{task.name}" for task in manifest.tasks}
    counts = dict.fromkeys(names, Labels(0, 0))
    ids = [f"candidate.{f.name}" for f in manifest.features_in("candidate") if f.table is not None and not f.is_bag]
    unknown = dict.fromkeys(ids, 0)
    weight = [f"sampling.{name}" for name in manifest.sampling if name == "weight"]
    for file in split.files:
        for batch in pq.ParquetFile(root / file).iter_batches(columns=[*names.values(), *weight, *ids]):
            for column in ids:
                is_unknown = pc.equal(pc.list_flatten(batch[column]), schema.UNKNOWN_INDEX)
                unknown[column] += pc.sum(is_unknown).as_py() or 0
            counted = pc.greater(pc.list_flatten(batch[weight[0]]), 0) if weight else None
            for task, name in names.items():
                values = pc.list_flatten(batch[name])
                values = values if counted is None else values.filter(counted)
                observed, positive = counts[task]
                counts[task] = Labels(
                    observed + len(values) - values.null_count, positive + int(pc.sum(values).as_py() or 0)
                )
    return counts, {column: count / max(split.num_candidates, 1) for column, count in unknown.items()}


def check_join(what: str, num_joined: int, num_all: int, is_allowed: bool) -> None:
    """Reports how many ids of one table another one has; ValueError if it is none, a warning if many are missing."""
    words = f"{num_joined:,} of {num_all:,} {what}"
    if not num_joined and num_all:
        complain([f"{words}: are the ids spelled alike in both (leading zeros, prefixes)?"], is_allowed)
    elif num_joined < WARN_BELOW * num_all:
        progress.warn(words)
    else:
        progress.say(f"  {words}")
