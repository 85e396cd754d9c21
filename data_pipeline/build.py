"""Entry: raw files -> Parquet + manifest.json.

python -m data_pipeline.build --source amazon_grocery --raw_dir DIR --out_dir OUT
python -m data_pipeline.build --source kuairand_pure --raw_dir DIR_WITH_A_LATER_DAY --out_dir OUT --split holdout
"""

import argparse
import dataclasses
import math
import pathlib
import shlex
import sys
import time

from data_pipeline import (
    append,
    canonical,
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
from gpsd_dist import schema

EVENTS_PER_BUCKET = 5_000_000  # untuned; what it costs in memory: README.md, "Larger than memory"
SPLITS = ("pretrain", "train", "valid", "test")
NOT_RECORDED = (
    "source",
    "raw_dir",
    "out_dir",
    "split",
    "append_to",
    "engine",
    "memory_limit",
    "threads",
    "spark_master",
    "spark_conf",
    "num_buckets",
    "force",
)  # options that leave the rows alone


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status. A user's mistake prints one line and gives 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse(argv)
        build(options, "python -m data_pipeline.build " + shlex.join(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Options of the pipeline and of the chosen source; unknown ones are an error."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.build", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", required=True, choices=sorted(sources.SOURCES))
    parser.add_argument("--raw_dir", type=pathlib.Path, help="folder with the raw files")
    parser.add_argument("--out_dir", type=pathlib.Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--split", choices=("all", "holdout"), default="all", help="holdout: add a later day to a built data set"
    )
    parser.add_argument(
        "--append_to", type=pathlib.Path, help="a built data set: add the next day of its log to it, into --out_dir"
    )
    parser.add_argument("--max_history_length", type=int, default=50, help="most recent events kept per row")
    parser.add_argument("--min_count", type=int, default=1, help="ids with fewer training occurrences become unknown")
    parser.add_argument(
        "--valid_fraction", type=float, default=0.15, help="part of the train users, where a rule carves valid out"
    )
    parser.add_argument("--num_negatives", type=int, default=1, help="drawn per positive, where the log has no labels")
    parser.add_argument("--negatives", choices=negatives.DISTRIBUTIONS, default="uniform")
    unbounded.add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the drawn negatives")
    parser.add_argument("--compression", choices=write.COMPRESSIONS, default="zstd")
    parser.add_argument(
        "--row_group_rows", type=int, default=4096, help="small groups shuffle better, large ones read faster"
    )
    parser.add_argument("--file_rows", type=int, default=1 << 20, help="rows per part file")
    engine.add_arguments(parser)
    parser.add_argument(
        "--num_buckets", type=int, default=0, help="of users, worked on one after the other; 0: by the number of events"
    )
    parser.add_argument("--force", action="store_true", help="build even if nothing changed")
    known, _ = parser.parse_known_args(argv)
    sources.load(known.source).add_arguments(parser)
    options = parser.parse_args(argv)
    # a pretraining row needs two events: one to read and one to predict
    smallest = {"max_history_length": 2, "min_count": 1, "num_negatives": 1, "row_group_rows": 1, "file_rows": 1}
    problems = [
        f"--{name} {getattr(options, name)} must be at least {least}"
        for name, least in smallest.items()
        if getattr(options, name) < least
    ]
    if options.append_to is not None:
        if options.split != "all":
            problems.append("--append_to adds the later day as `test`; leave --split out")
        options.split = "append"  # sources then look for older raw files where the data set was built from
    if not 0 <= options.num_buckets <= 4096:
        problems.append(f"--num_buckets {options.num_buckets} must lie between 0 and 4096")
    if not 0 < options.valid_fraction < 1:
        problems.append(f"--valid_fraction {options.valid_fraction} must lie between 0 and 1")
    if problems:
        raise ValueError("; ".join(problems))
    return options


def build(options: argparse.Namespace, command: str) -> None:
    """Builds, checks and moves the data set (or its holdout split) into place. ValueError for every problem of the
    input.
    """
    started = time.monotonic()
    source = sources.load(options.source)
    out_dir = options.out_dir
    has_previous = (out_dir / schema.MANIFEST_NAME).is_file()
    if options.append_to is not None:
        append.build(options, source, command)
    elif options.split == "holdout":
        holdout.build(options, source, command)
    else:
        files = source.find_files(options.raw_dir, options)
        prints = fingerprint.describe(files, recorded(options), options.source)
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


def recorded(options: argparse.Namespace) -> dict:
    """The options that decide what is written; they go into the fingerprint and the manifest."""
    return {name: value for name, value in vars(options).items() if name not in NOT_RECORDED}


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
    running: engine.Engine, rows, name: str, manifest: schema.Manifest, root: pathlib.Path, options: argparse.Namespace
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
