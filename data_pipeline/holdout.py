"""Adds the split `holdout` (a day after the test period) to a built data set, with its vocabularies unchanged."""

import dataclasses
import os
import pathlib
import reprlib
import shutil
import types

import ibis.expr.types as ir
import pydantic

from data_pipeline import (
    canonical,
    engine,
    explain,
    fingerprint,
    progress,
    sequences,
    sources,
    splits,
    validate,
    validate_rows,
    vocab,
    write,
)
from data_pipeline.options import BuildOptions
from gpsd_dist import schema

NAME = "holdout"
PREFIX = "holdout: "


def build(options: BuildOptions, source: types.ModuleType, command: str) -> None:
    """Writes OUT/holdout and adds it to the manifest; an existing one is replaced. ValueError for every problem of the
    input.
    """
    out_dir = options.out_dir
    previous = schema.read_manifest(out_dir)
    options = sources.complete(source, as_built(options, previous, out_dir))
    files = source.find_files(options)
    prints = fingerprint.describe(files, {"raw_dir": None}, options.source)
    before = previous.options.get(NAME, {})
    has_split = any(split.name == NAME for split in previous.splits)
    if has_split and before.get("fingerprint") == prints["fingerprint"] and not options.force:
        progress.say(f"{out_dir / NAME} is up to date: same raw files and pipeline code; nothing to do")
        return
    progress.say(f"build {options.source}, split {NAME} -> {out_dir / NAME}")
    aside = out_dir.parent / f".{out_dir.name}.{NAME}-{os.getpid()}"
    aside.mkdir()
    try:
        with engine.scratch(options, out_dir.parent) as running:
            split, skipped = _write(running, source.read(running, files, options), previous, out_dir, aside, options)
        manifest = dataclasses.replace(
            previous,
            splits=(*(other for other in previous.splits if other.name != NAME), split),
            skipped={reason: count for reason, count in previous.skipped.items() if not reason.startswith(PREFIX)}
            | {PREFIX + reason: count for reason, count in skipped.items()},
            options=previous.options
            | {NAME: {"fingerprint": prints["fingerprint"], "command": command, "sources": list(prints["sources"])}},
        )
        problems = validate_rows.Problems()
        validate.check_split(aside, manifest, split, problems)
        problems.raise_if_any(aside)
        write.replace_folder(aside / NAME, out_dir / NAME)
        schema.write_manifest(manifest, out_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def as_built(options: BuildOptions, previous: schema.Manifest, folder: pathlib.Path) -> BuildOptions:
    """The options that the data set in `folder` was built with; later rows cannot be cut or encoded in another way."""
    if options.raw_dir is None:
        raise ValueError("--raw_dir is missing; it is the folder with the later log")
    if previous.source != options.source:
        raise ValueError(f"{folder} was built with --source {previous.source}, not {options.source}; use that source")
    built_from = previous.options.get("raw_dir")
    if not isinstance(built_from, str | None):
        path, found = folder / schema.MANIFEST_NAME, reprlib.repr(built_from)
        raise ValueError(f"{path}: options.raw_dir is {found}, expected a folder's name; build the data set again")
    if built_from is None or not pathlib.Path(built_from).is_dir():
        built_from = options.raw_dir  # then raw_dir must hold everything, and find_files says what it lacks
    # `split_rule` of a manifest is the name of the rule's class, not the option of some sources.
    known = {k: previous.options[k] for k in options.recorded() if k in previous.options and k != "split_rule"}
    if "schema" in options.given:  # the description that is given now counts
        known.pop("schema", None)
    elif isinstance(known.get("schema"), str):
        known["schema"] = pathlib.Path(known["schema"])  # the manifest has it as text
    try:
        return dataclasses.replace(options.settled(known), built_from_dir=pathlib.Path(built_from))
    except pydantic.ValidationError as error:
        wrong = [f"options.{w.key} is {reprlib.repr(w.given)}, expected {w.expected}" for w in explain.problems(error)]
        path = folder / schema.MANIFEST_NAME
        raise ValueError(f"{path}: {'; '.join(wrong)}; build the data set again") from error


def check_same_contract(log: canonical.Log, previous: schema.Manifest, folder: pathlib.Path) -> None:
    """ValueError unless the log has the features and tasks of the data set in `folder`."""
    unmeasured = tuple(dataclasses.replace(feature, mean=0.0, std=1.0) for feature in previous.features)
    if tuple(spec.feature() for spec in log.features) != unmeasured or log.tasks != previous.tasks:
        raise ValueError(f"{folder} was built with other features or tasks than this version has; build it again first")


def exposures_around(log: canonical.Log, until_s: int) -> tuple[int, int]:
    """How many lie before that moment, and how many at or after it."""
    is_later = log.exposures.time_s >= until_s
    found = log.exposures.agg(later=is_later.sum().fill_null(0), num=log.exposures.count()).execute().iloc[0]
    return int(found["num"]) - int(found["later"]), int(found["later"])


def check_old_exposures(num_old: int, previous: schema.Manifest, folder: pathlib.Path, until_s: int) -> None:
    """ValueError if the log has more or fewer exposures before `until_s` than the data set in `folder` was made of."""
    expected = sum(previous.split(name).num_candidates for name in ("train", "valid", "test"))
    if num_old != expected:
        raise ValueError(
            f"the log holds {num_old:,} exposures before {until_s} (epoch s), but {folder} was made of {expected:,}; "
            "histories need the whole log, its old part unchanged: complete --raw_dir, or build again"
        )


def read_vocabulary(running: engine.Engine, table: schema.Table, folder: pathlib.Path) -> ir.Table:
    """A written vocabulary. ValueError if it is not the one that the manifest describes."""
    path = folder / "vocab" / f"{table.name}.parquet"
    words = vocab.read(running, table.name, path)
    if vocab.measure(path) != (table.num_rows, table.fingerprint):
        raise ValueError(f"{path} is not the vocabulary that the manifest describes; build the data set again")
    return words


def _write(
    running: engine.Engine,
    log: canonical.Log,
    previous: schema.Manifest,
    out_dir: pathlib.Path,
    aside: pathlib.Path,
    options: BuildOptions,
) -> tuple[schema.Split, dict[str, int]]:
    canonical.check(log)
    check_same_contract(log, previous, out_dir)
    until_s = log.split.test_until_s if isinstance(log.split, canonical.TimeBoundaries) else None
    if until_s is not None:  # else `cut` says why there is no holdout
        check_old_exposures(exposures_around(log, until_s)[0], previous, out_dir, until_s)
    bounded = (table for table in previous.tables if table.name not in previous.unbounded)
    vocabs = {table.name: read_vocabulary(running, table, out_dir) for table in bounded}
    events = splits.number_events(running, log)
    cut = splits.cut(running, log, events, is_holdout=True)
    encoder = sequences.Encoder(running, log, vocabs)
    items, users = encoder.items(), encoder.users()
    histories = sequences.user_sequences(encoder, events, items)
    rows = sequences.request_rows(encoder, cut.candidates, items, users, histories, previous.max_history_length)
    split = write.write_split(
        running,
        rows,
        NAME,
        schema.arrow_schema(previous, NAME),
        aside,
        row_group_rows=options.row_group_rows,
        file_rows=options.file_rows,
        compression=options.compression,
    )
    return split, {**log.skipped, **cut.skipped}
