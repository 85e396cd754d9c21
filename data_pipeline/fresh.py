"""Plans a new data set: all splits of the log, with vocabularies of its training period."""

import dataclasses
import pathlib

from data_pipeline import canonical, engine, negatives, progress, sequences, splits, unbounded, vocab, write
from data_pipeline.options import BuildOptions
from data_pipeline.plan import Job, Plan
from gpsd_dist import schema
from gpsd_dist.data import data_versions
from gpsd_dist.disk.reading import raise_if_passing

ONLY = None  # all splits are made anew
SPLITS = ("pretrain", "train", "valid", "test")
BOUNDARIES = "boundaries_s"
"""Option of the manifest: [valid_from, test_from, test_until] in epoch s, for a later append."""


def find_previous(options: BuildOptions) -> None:
    """Finds no data set to add to: the version is made of the log alone."""


def fingerprinted(options: BuildOptions) -> dict:
    """Returns the options that decide whether there is anything to do."""
    return options.recorded()


def is_current(options: BuildOptions, previous: None, fingerprint: str) -> bool:
    """Tells whether the current version in --out_dir has all files of a data set with that fingerprint."""
    try:
        folder = data_versions.current(options.out_dir)
        if not (folder / schema.MANIFEST_NAME).is_file():
            return False
        found = schema.read_manifest(folder)
    except (ValueError, OSError) as error:
        raise_if_passing(options.out_dir, error)
        progress.say(f"building again: {error}")
        return False
    is_complete = all((folder / file).is_file() for split in found.splits for file in split.files)
    return is_complete and found.options.get("fingerprint") == fingerprint


def plan(running: engine.Engine, log: canonical.Log, job: Job) -> Plan:
    """Plans vocabularies, all splits and items."""
    options = job.options
    num_buckets = splits.num_buckets(log, options.num_buckets)
    events = splits.number_events(running, log, num_buckets)
    cut = splits.cut(running, log, events, is_holdout=False, by_day=job.options.daily_requests)
    occurrences = sequences.occurrences(log, cut, options.min_count)
    without_vocabulary = unbounded.tables(options, log)
    candidates, skipped = cut.candidates, {**log.skipped, **cut.skipped}
    vocabularies = {
        name: without_vocabulary[name].vocabulary(name)
        if name in without_vocabulary
        else vocab.Vocabulary(vocab.build(running, name, counts, min_count))
        for name, (counts, min_count) in occurrences.items()
    }
    if log.exposures is None:
        item_counts, _ = occurrences[sequences.item_table(log)]
        candidates, short = negatives.add(running, log, candidates, events, item_counts, options)
        skipped |= short
    num_short = int(cut.pretrain.filter(cut.pretrain.num_events < 2).count().execute())
    if num_short:
        skipped["users without a pretrain row (fewer than 2 events in it)"] = num_short
    return Plan(
        rows=sequences.Rows(log, events, cut.pretrain, candidates, num_buckets),
        vocabularies=vocabularies,
        splits={name: name for name in SPLITS},
        manifest=_manifest(log, cut, skipped, {name: table.kind for name, table in without_vocabulary.items()}, job),
        finish=_finish,
    )


def _manifest(
    log: canonical.Log, cut: splits.Cut, skipped: dict[str, int], unbounded_kinds: dict[str, str], job: Job
) -> schema.Manifest:
    options = job.options
    raw_dir = None if options.raw_dir is None else str(options.raw_dir.resolve())  # where a later holdout finds files
    bounds = {BOUNDARIES: splits.boundaries(log)} if isinstance(log.split, canonical.TimeBoundaries) else {}
    return schema.Manifest(
        source=options.source,
        features=tuple(spec.feature() for spec in log.features),
        tables=(),
        tasks=log.tasks,
        splits=(),
        max_history_length=options.max_history_length,
        item_feature=log.item_feature,
        split_rule=f"{cut.words}; order of events: {log.order_words}",
        skipped=skipped,
        sources=job.prints["sources"],
        options=job.prints["options"]
        | ({"reading": log.reading} if log.reading else {})
        | {"fingerprint": job.prints["fingerprint"], "split_rule": type(log.split).__name__, "raw_dir": raw_dir}
        | bounds,
        command=job.command,
        unbounded=unbounded_kinds,
        sampling=log.sampling,
    )


def _finish(manifest: schema.Manifest, written: dict[str, schema.Split], root: pathlib.Path) -> schema.Manifest:
    features = write.with_statistics(manifest, written["train"], root)
    return dataclasses.replace(manifest, features=features, splits=tuple(written.values()))
