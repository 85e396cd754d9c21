"""Plans how the next day of a log is added to a data set: new rows, larger vocabularies, and splits one period later.

    python -m data_pipeline.build --source S --raw_dir RAW --append_to DAY1 --out_dir DAY2     # DAY2 may be DAY1

The exposures after the old test period are the new `test`; the old `test` becomes `valid`, and the old `valid` joins
`train`. So training rows still lie before the rows that are scored, and yesterday's model is scored on today's log
before it is trained on it. Part files that were written are kept as they are (hard links), so an id that enters a
vocabulary now is unknown (1) in older rows.
"""

import dataclasses
import functools
import pathlib
import reprlib
import typing

import ibis
import ibis.expr.types as ir

from data_pipeline import canonical, engine, fresh, holdout, previous, progress, sequences, splits, vocab
from data_pipeline.options import BuildOptions
from data_pipeline.plan import Job, Plan
from data_pipeline.previous import Previous
from gpsd_dist import schema
from gpsd_dist.data import data_versions

ONLY = None  # the version has all splits
CHAIN = "chain"
"""Option of the manifest: one entry per append, with the parent's manifest hash, raw files, tables and command."""


class Bounds(typing.NamedTuple):
    """Holds where the splits of a data set lie, epoch seconds."""

    valid_from: int
    test_from: int
    test_until: int


def find_previous(options: BuildOptions) -> Previous:
    """Reads the data set that --append_to names. ValueError if it is not cut by time, or of another source."""
    found = previous.read(options.append_to, options)
    bounds_of(found)
    return found


def fingerprinted(options: BuildOptions) -> dict:
    """Returns what enters the fingerprint of the step. Other options are those of the parent, so they cannot differ."""
    return {"append": True}


def is_current(options: BuildOptions, parent: Previous, fingerprint: str) -> bool:
    """Tells whether the data set in --out_dir already ends with this step."""
    folder = data_versions.current(options.out_dir)
    if not (folder / schema.MANIFEST_NAME).is_file():
        return False
    chain = schema.read_manifest(folder).options.get(CHAIN, [])
    if not chain or chain[-1].get("fingerprint") != fingerprint:
        return False
    is_in_place = folder.resolve() == parent.folder.resolve()
    return is_in_place or chain[-1].get("parent_manifest_sha256") == parent.manifest_sha256


def bounds_of(parent: Previous) -> Bounds:
    """Reads the boundaries that the data set was cut by. ValueError if it was not cut by time, or says so wrongly."""
    options = parent.manifest.options
    found = options.get(fresh.BOUNDARIES)
    if not found:
        raise ValueError(
            f"{parent.folder} cannot be appended to: its splits are not cut by time (rule "
            f"{options.get('split_rule')}), or it was built by an older version; build it again"
        )
    is_right = isinstance(found, list) and len(found) == 3 and all(type(bound) is int for bound in found)
    if not is_right or not found[0] <= found[1] <= found[2]:
        raise ValueError(
            f"{parent.folder / schema.MANIFEST_NAME}: options.{fresh.BOUNDARIES} is {reprlib.repr(found)}, expected "
            "three times in epoch seconds, none before the one before it; build the data set again"
        )
    return Bounds(*found)


def plan(running: engine.Engine, log: canonical.Log, job: Job) -> Plan:
    """Plans the day's `test`, new pretraining rows of users with new events, and vocabularies that keep old indices."""
    parent = job.previous
    old = bounds_of(parent)
    previous.check_same_contract(log, parent)
    late = _count_late_exposures(log, parent, old)
    log = _moved_on(log, old)
    num_buckets = splits.num_buckets(log, job.options.num_buckets)
    events = splits.number_events(running, log, num_buckets)
    cut = splits.cut(running, log, events, is_holdout=False, by_day=job.options.daily_requests)
    day = running.materialise("candidates", cut.candidates.filter(cut.candidates.split == "test"))
    lengths = _new_lengths(log, events, cut, old)
    users = day.select("user_id").union(lengths.select("user_id")).distinct()
    folder = f"appended-{len(parent.manifest.options.get(CHAIN, [])) + 1:04d}"
    kept = [split for split in parent.manifest.splits if split.name != holdout.NAME]
    manifest = dataclasses.replace(
        parent.manifest,
        split_rule=f"{cut.words}; order of events: {log.order_words}",
        skipped={**log.skipped, **cut.skipped, **late},
    )
    return Plan(
        rows=sequences.Rows(log, events.filter(events.user_id.isin(users.user_id)), lengths, day, num_buckets),
        vocabularies=_vocabularies(running, log, cut, job),
        splits={"pretrain": f"{folder}-pretrain", "test": folder},
        manifest=manifest,
        finish=functools.partial(_finish, job=job, boundaries=splits.boundaries(log), reading=log.reading),
        linked_files=tuple(file for split in kept for file in split.files),
    )


def _count_late_exposures(log: canonical.Log, parent: Previous, old: Bounds) -> dict[str, int]:
    """Counts late exposures. ValueError unless the log holds what the parent was made of, and later ones."""
    if not previous.exposures_around(log, old.test_until)[1]:
        raise ValueError(
            f"no exposure lies at or after {old.test_until} (epoch s), the end of the test period of {parent.folder}; "
            "--append_to needs a later log"
        )
    return previous.count_late_exposures(log, parent, old.test_until)


def _moved_on(log: canonical.Log, old: Bounds) -> canonical.Log:
    """Moves the splits by one period: the old test period becomes `valid`, and all that follows `test`."""
    assert isinstance(log.split, canonical.TimeBoundaries)  # the parent was cut by time, and its source is the same
    words = f"appended: train < {old.test_from} <= valid < {old.test_until} <= test (epoch s)"
    rule = dataclasses.replace(
        log.split, valid_from_s=old.test_from, test_from_s=old.test_until, test_until_s=None, words=words
    )
    return dataclasses.replace(log, split=rule)


def _new_lengths(log: canonical.Log, events: ir.Table, cut: splits.Cut, old: Bounds) -> ir.Table:
    """Selects users who get a new pretraining row: they have events in the old `valid` period, now part of `train`."""
    if log.split.pretrain_until_s is not None:
        return cut.pretrain.filter(ibis.literal(False))  # the source ends pretraining at a fixed time
    gained = events.filter((events.known_s >= old.valid_from) & (events.known_s < old.test_from))
    return cut.pretrain.filter(cut.pretrain.user_id.isin(gained.select("user_id").distinct().user_id))


def _vocabularies(running: engine.Engine, log: canonical.Log, cut: splits.Cut, job: Job) -> dict[str, vocab.Vocabulary]:
    found, parent = {}, job.previous.manifest
    for name, (counts, min_count) in sequences.occurrences(log, cut, job.options.min_count).items():
        table = parent.table(name)
        if name in parent.unbounded:
            found[name] = vocab.Vocabulary(None, table)
        else:
            old = previous.read_vocabulary(running, table, job.previous)
            found[name] = vocab.Vocabulary(vocab.grow(running, name, counts, min_count, old, table.num_rows))
    return found


def _finish(
    manifest: schema.Manifest,
    written: dict[str, schema.Split],
    root: pathlib.Path,
    *,
    job: Job,
    boundaries: list[int],
    reading: dict,
) -> schema.Manifest:
    """Moves the splits on and adds a step to the chain of parents."""
    parent = job.previous.manifest
    grown = {table.name: table.num_rows - parent.table(table.name).num_rows for table in manifest.tables}
    for name, num in grown.items():
        progress.say(f"  table {name:<24} {num:>11,} new rows")
    step = {
        "parent": str(job.previous.folder),
        "parent_manifest_sha256": job.previous.manifest_sha256,
        "fingerprint": job.prints["fingerprint"],
        "command": job.command,
        "sources": list(job.prints["sources"]),
        "tables": [dataclasses.asdict(table) for table in parent.tables],
        "new_rows": grown,
        "test_rows": written["test"].num_rows,
    }
    options = {name: value for name, value in parent.options.items() if name != holdout.NAME}
    steps: dict[str, typing.Any] = {CHAIN: [*parent.options.get(CHAIN, []), step], fresh.BOUNDARIES: boundaries}
    steps |= {"reading": reading} if reading else {}
    return dataclasses.replace(manifest, splits=_moved_splits(parent, written), options=options | steps)


def _moved_splits(parent: schema.Manifest, written: dict[str, schema.Split]) -> tuple[schema.Split, ...]:
    """Joins old and new pretraining rows, and old train and valid; the old test is valid, and the day is test."""
    old, new = parent.split("pretrain"), written["pretrain"]
    longer = dataclasses.replace(
        old,
        files=(*old.files, *new.files),
        num_rows=old.num_rows + new.num_rows,
        num_history_tokens=old.num_history_tokens + new.num_history_tokens,
    )
    train = dataclasses.replace(parent.split("train+valid"), name="train")
    return longer, train, dataclasses.replace(parent.split("test"), name="valid"), written["test"]
