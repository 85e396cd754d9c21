"""Plans the split `holdout`, a day after the test period of a built data set, with its vocabularies unchanged."""

import dataclasses
import functools
import pathlib

import ibis

from data_pipeline import canonical, engine, previous, sequences, splits, vocab
from data_pipeline.options import BuildOptions
from data_pipeline.plan import Job, Plan
from data_pipeline.previous import Previous
from gpsd_dist import schema

NAME = "holdout"
ONLY = NAME  # the other splits are those of the version before
PREFIX = "holdout: "
"""Begins the reasons for skipped rows of this split, beside those of the data set."""


def find_previous(options: BuildOptions) -> Previous:
    """Reads the data set in --out_dir. ValueError if it is of another source."""
    return previous.read(options.out_dir, options)


def fingerprinted(options: BuildOptions) -> dict:
    """Returns the options that decide whether there is anything to do: all others are those of the data set."""
    return {"raw_dir": None}


def is_current(options: BuildOptions, found: Previous, fingerprint: str) -> bool:
    """Tells whether the data set already has a holdout with that fingerprint."""
    has_split = any(split.name == NAME for split in found.manifest.splits)
    return has_split and found.manifest.options.get(NAME, {}).get("fingerprint") == fingerprint


def plan(running: engine.Engine, log: canonical.Log, job: Job) -> Plan:
    """Plans the requests after the test period, which see all earlier events."""
    manifest = job.previous.manifest
    previous.check_same_contract(log, job.previous)
    until_s = log.split.test_until_s if isinstance(log.split, canonical.TimeBoundaries) else None
    late = {}
    if until_s is not None:  # otherwise `cut` says why there is no holdout
        late = previous.count_late_exposures(log, job.previous, until_s)
    vocabularies = {
        table.name: vocab.Vocabulary(
            None if table.name in manifest.unbounded else previous.read_vocabulary(running, table, job.previous), table
        )
        for table in manifest.tables
    }
    num_buckets = splits.num_buckets(log, job.options.num_buckets)
    events = splits.number_events(running, log, num_buckets)
    cut = splits.cut(running, log, events, is_holdout=True, by_day=job.options.daily_requests)
    no_pretraining = cut.pretrain.filter(ibis.literal(False))
    return Plan(
        rows=sequences.Rows(log, events, no_pretraining, cut.candidates, num_buckets),
        vocabularies=vocabularies,
        splits={NAME: NAME},
        manifest=manifest,
        finish=functools.partial(_finish, job=job, skipped={**log.skipped, **cut.skipped, **late}),
        linked_files=_unchanged_files(job.previous),
    )


def _unchanged_files(found: Previous) -> tuple[str, ...]:
    """Names all files of the data set that stay: vocabularies, items, and all splits but an earlier holdout."""
    words = [
        f"vocab/{table.name}.parquet" for table in found.manifest.tables if table.name not in found.manifest.unbounded
    ]
    files = [file for split in found.manifest.splits if split.name != NAME for file in split.files]
    return (*words, "items.parquet", *files)


def _finish(
    manifest: schema.Manifest,
    written: dict[str, schema.Split],
    root: pathlib.Path,
    *,
    job: Job,
    skipped: dict[str, int],
) -> schema.Manifest:
    """Adds the split to the manifest, or replaces the one that it has."""
    others = {reason: count for reason, count in manifest.skipped.items() if not reason.startswith(PREFIX)}
    step = {"fingerprint": job.prints["fingerprint"], "command": job.command, "sources": list(job.prints["sources"])}
    return dataclasses.replace(
        manifest,
        splits=(*(split for split in manifest.splits if split.name != NAME), written[NAME]),
        skipped=others | {PREFIX + reason: count for reason, count in skipped.items()},
        options=manifest.options | {NAME: step},
    )
