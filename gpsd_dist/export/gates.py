"""Refuses a version whose smaller tables lose AUC on `valid`, or whose AUC is below that of the version in use.

Shape letter: C candidates.
"""

import collections.abc
import copy
import datetime
import logging
import os
import typing

import numpy as np

from gpsd_dist.checkpoint.files import Reader
from gpsd_dist.export import weights
from gpsd_dist.export.options import Options
from gpsd_dist.export.parquet_tokens import Labelled, Rows, read_split
from gpsd_dist.export.raw_requests import read_requests
from gpsd_dist.export.source import Source
from gpsd_dist.metrics.binary_metrics import SECONDS_PER_DAY
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.schema import Manifest, Split
from gpsd_dist.serving.artefact import Draft
from gpsd_dist.serving.scorer import Scorer, load, map_tables

log = logging.getLogger(__name__)

MAX_LOSS = {"fp16": 1e-4, "int8": 5e-4}
"""Change of the AUC that tables in fewer bits may cause."""


def check_loss(source: Source, scorer: Scorer, draft: Draft, options: Options) -> None:
    """Compares the AUC on `valid` with that of tables that lose no digits. ValueError names the tasks."""
    reader, run, manifest = Reader(source.checkpoint), source.run, source.manifest
    lossy = weights.lossy_tables(reader, scorer.tables, options.table_dtype)
    if not lossy:
        return
    kept, kept_bytes = dict(draft.blobs), draft.new_blob_bytes
    entries = {name: weights.write_table(draft, reader, manifest.table(name), run, "fp32") for name in lossy}
    draft.blobs, draft.new_blob_bytes = kept, kept_bytes  # no version names the exact tables, so they go with the draft
    exact = copy.copy(scorer)
    exact.tables = scorer.tables | map_tables(draft.root, entries)
    before, after = (aucs(each, read_split(run, manifest, "valid", managed(scorer))) for each in (exact, scorer))
    for task, value in after.items():
        log.info("%s tables: AUC of %s on valid %.6f -> %.6f", options.table_dtype, task, before[task], value)
    limit = MAX_LOSS[options.table_dtype]
    if (found := problems(before, after, limit)) and not options.accept_loss:
        raise ValueError(
            f"{options.table_dtype} tables change the AUC on valid by more than {limit:g} ({'; '.join(found)}): "
            "export with more bits, or with --accept_loss"
        )


def check_replaces(source: Source, scorer: Scorer, out: str | os.PathLike[str], options: Options) -> None:
    """Compares the AUC on the newest labelled day with that of the current version. ValueError if it is lower."""
    current, run, manifest = load(out, verify=False), source.run, source.manifest
    split, day = newest_labelled(manifest)
    if current.manifest.features == scorer.manifest.features and current.manifest.tables == scorer.manifest.tables:
        rows = read_split(run, manifest, split.name, managed(current))
    else:
        rows = read_requests(run, manifest, split.name, current.reader)
    before = aucs(current, of_day(rows, day))
    after = aucs(scorer, of_day(read_split(run, manifest, split.name, managed(scorer)), day))
    task, date = scorer.tasks[0].name, datetime.date.fromtimestamp(0) + datetime.timedelta(days=day)
    day_text = f"AUC of {task} on {date}, the newest day with labels"
    text = f"{day_text}: {after[task]:.5f}, and {before[task]:.5f} of the current version {current.version}"
    log.info("%s", text)
    if not after[task] >= before[task] and not options.accept_worse:
        raise ValueError(f"{text}, which stays: train anew, or export with --accept_worse")


def managed(scorer: Scorer) -> Rows:
    """Returns managed table -> map from 64-bit ids to its rows."""
    names = [name for name, kind in scorer.manifest.unbounded.items() if kind == "managed"]
    return {name: scorer.vocabularies[name].rows for name in names}


def aucs(scorer: Scorer, rows: collections.abc.Iterable[Labelled]) -> dict[str, float]:
    """Computes task -> AUC over the candidates whose label is observed; a conditional task where the other one is 1."""
    predictions = {task.name: Predictions() for task in scorer.tasks}
    for part in rows:
        logits = scorer.score_tokens(part.tokens)
        for task in scorer.tasks:
            label_C = part.labels[task.name]
            if task.given is not None:
                label_C = np.where(part.labels[task.given] == 1, label_C, np.nan)
            observed_C = ~np.isnan(label_C)
            predictions[task.name].add(logits[task.name], label_C, part.user_hash_C, observed_C)
    return {name: float(found.metrics()["auc"]) for name, found in predictions.items()}


def problems(before: dict[str, float], after: dict[str, float], limit: float) -> list[str]:
    """Lists the tasks whose AUC changes by more than `limit`. An AUC of one class is NaN and changes nothing."""
    return [
        f"{task}: AUC {before[task]:.6f} -> {value:.6f}"
        for task, value in after.items()
        if abs(value - before[task]) > limit
    ]


def newest_labelled(manifest: Manifest) -> tuple[Split, int]:
    """Finds the newest day that has labels: (its split, the UTC day). ValueError if no split has requests."""
    splits = [split for split in manifest.splits if split.time_to_s is not None and split.num_candidates]
    if not splits:
        raise ValueError("the data have no labelled requests, so versions cannot be compared; leave out --replaces")
    newest = max(splits, key=lambda split: typing.cast(int, split.time_to_s))
    return newest, typing.cast(int, newest.time_to_s) // SECONDS_PER_DAY


def of_day(rows: collections.abc.Iterable[Labelled], day: int) -> collections.abc.Iterator[Labelled]:
    """Keeps the labels of one UTC day."""
    for part in rows:
        is_day_C = part.request_time_s_C // SECONDS_PER_DAY == day
        if is_day_C.any():
            labels = {task: np.where(is_day_C, label_C, np.nan) for task, label_C in part.labels.items()}
            yield Labelled(part.tokens, labels, part.user_hash_C, part.request_time_s_C)
