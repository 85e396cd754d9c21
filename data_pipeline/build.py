"""Entry: raw files -> Parquet + manifest.json.

python -m data_pipeline.build --source amazon_grocery --raw_dir DIR --out_dir OUT
python -m data_pipeline.build --source kuairand_pure --raw_dir DIR_WITH_A_LATER_DAY --out_dir OUT --split holdout
"""

import dataclasses
import math
import pathlib
import shlex
import sys
import time

from data_pipeline import (
    append,
    canonical,
    command_line,
    engine,
    fingerprint,
    holdout,
    negatives,
    progress,
    sequences,
    sources,
    splits,
    unbounded,
    validate,
    vocab,
    write,
)
from data_pipeline.options import BuildOptions
from gpsd_dist import schema

EVENTS_PER_BUCKET = 5_000_000  # untuned; what it costs in memory: README.md, "Larger than memory"
SPLITS = ("pretrain", "train", "valid", "test")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status. A user's mistake prints one line and gives 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = command_line.parse(argv, __doc__)
        build(options, "python -m data_pipeline.build " + shlex.join(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build(options: BuildOptions, command: str) -> None:
    """Builds, checks and moves the data set (or its holdout split) into place. ValueError for every problem of the
    input.
    """
    started = time.monotonic()
    source = sources.load(options.source)
    out_dir = options.out_dir
    has_previous = (out_dir / schema.MANIFEST_NAME).is_file()
    if options.mode == "append":
        append.build(options, source, command)
    elif options.mode == "holdout":
        holdout.build(options, source, command)
    else:
        options = sources.complete(source, options)
        files = source.find_files(options)
        prints = fingerprint.describe(files, options.recorded(), options.source)
        if has_previous and not options.force and _is_current(out_dir, prints):
            progress.say(f"{out_dir} is up to date: same sources, options and pipeline code; nothing to do")
            return
        progress.say(f"build {options.source} -> {out_dir}")
        with (
            write.staged(out_dir) as aside,
            engine.scratch(options, out_dir.parent) as running,
        ):
            _build_all(running, options, source.read(running, files, options), prints, aside, command)
            validate.check(aside)
    report(schema.read_manifest(out_dir))
    progress.say(f"done in {time.monotonic() - started:.1f} s: {out_dir / schema.MANIFEST_NAME}")


def _is_current(out_dir: pathlib.Path, prints: dict) -> bool:
    try:
        previous = schema.read_manifest(out_dir)
    except (ValueError, OSError) as error:
        progress.say(f"building again: {error}")
        return False
    is_complete = all((out_dir / file).is_file() for split in previous.splits for file in split.files)
    return is_complete and previous.options.get("fingerprint") == prints["fingerprint"]


def _build_all(
    running: engine.Engine, options, log: canonical.Log, prints: dict, root: pathlib.Path, command: str
) -> None:
    """Vocabularies, all splits, items and the manifest, into `root`."""
    canonical.check(log)
    num_buckets = options.num_buckets or math.ceil(log.events.count().execute() / EVENTS_PER_BUCKET) or 1
    events = splits.number_events(running, log, num_buckets)
    cut = splits.cut(running, log, events, is_holdout=False)
    without_vocabulary = unbounded.tables(options, log)
    vocabs, tables = {}, []
    occurrences = sequences.occurrences(log, cut)
    for name, (counts, min_count) in occurrences.items():
        if name in without_vocabulary:
            kind, num_rows = without_vocabulary[name].kind, without_vocabulary[name].num_rows
            tables.append(schema.Table(name, num_rows, schema.unbounded_fingerprint(kind, num_rows)))
            continue
        vocabs[name] = vocab.build(running, name, counts, options.min_count if min_count is None else min_count)
        num_rows, digest = vocab.write(running, vocabs[name], root / "vocab" / f"{name}.parquet")
        tables.append(schema.Table(name, num_rows, digest))
    candidates, skipped = cut.candidates, {**log.skipped, **cut.skipped}
    if log.exposures is None:
        item_counts, _ = occurrences[sequences.item_table(log)]
        candidates, short = negatives.add(running, log, candidates, events, item_counts, options)
        skipped |= short
    raw_dir = (
        None if options.raw_dir is None else str(options.raw_dir.resolve())
    )  # where a later holdout finds the rest
    manifest = schema.Manifest(
        source=options.source,
        features=tuple(spec.feature() for spec in log.features),
        tables=tuple(tables),
        tasks=log.tasks,
        splits=(),
        max_history_length=options.max_history_length,
        item_feature=log.item_feature,
        split_rule=f"{cut.words}; order of events: {log.order_words}",
        skipped=skipped,
        sources=prints["sources"],
        options=prints["options"]
        | {"fingerprint": prints["fingerprint"], "split_rule": type(log.split).__name__, "raw_dir": raw_dir}
        | _boundaries(log),
        command=command,
        unbounded={name: table.kind for name, table in without_vocabulary.items()},
    )
    encoder = sequences.Encoder(running, log, vocabs)
    items, users = encoder.items(), encoder.users()
    inputs = sequences.Inputs(events, cut.pretrain, candidates, items, users)
    pretrain, requests = sequences.rows_in_buckets(encoder, inputs, options.max_history_length, num_buckets)
    num_short = int(cut.pretrain.filter(cut.pretrain.num_events < 2).count().execute())
    if num_short:
        skipped["users without a pretrain row (fewer than 2 events in it)"] = num_short
    rows = {"pretrain": pretrain} | {name: requests.filter(requests.split == name) for name in SPLITS[1:]}
    written = [write_split(running, rows[name], name, manifest, root, options) for name in SPLITS]
    item_features = tuple(spec.feature() for spec in log.features if spec.origin == "items")
    write.write_items(
        running, sequences.item_rows(encoder, items), item_features, root / "items.parquet", options.compression
    )
    features = write.with_statistics(manifest, dict(zip(SPLITS, written, strict=True))["train"], root)
    manifest = dataclasses.replace(manifest, features=features, splits=tuple(written), skipped=skipped)
    schema.write_manifest(manifest, root)


def _boundaries(log: canonical.Log) -> dict:
    """Where splits that are cut by time begin and end, for a later append."""
    if not isinstance(log.split, canonical.TimeBoundaries):
        return {}
    return {append.BOUNDARIES: list(append.bounds_of_log(log))}


def write_split(
    running: engine.Engine, rows, name: str, manifest: schema.Manifest, root: pathlib.Path, options: BuildOptions
) -> schema.Split:
    """One split, with the file options of the command line."""
    return write.write_split(
        running,
        rows,
        name,
        schema.arrow_schema(manifest, name),
        root,
        row_group_rows=options.row_group_rows,
        file_rows=options.file_rows,
        compression=options.compression,
    )


def report(manifest: schema.Manifest) -> None:
    """Prints what was built and what was left out."""
    for split in manifest.splits:
        print(
            f"  {split.name:<9} {split.num_rows:>11,} rows {split.num_history_tokens:>13,} history tokens "
            f"{split.num_candidates:>12,} candidates"
        )
    for table in manifest.tables:
        progress.say(f"  table {table.name:<24} {table.num_rows:>11,} rows")
    for reason, count in manifest.skipped.items():
        progress.say(f"  skipped {count:,}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
