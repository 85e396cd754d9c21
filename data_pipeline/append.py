"""Adds the next day of a log to a data set: rows of the day, vocabularies that only grow, splits that move on.

    python -m data_pipeline.build --source S --raw_dir RAW --append_to DAY1 --out_dir DAY2     # DAY2 may be DAY1

The exposures after the old test period are the new `test`; the old `test` becomes `valid`, and the old `valid` joins
`train`. So no row is trained on that lies after one it is scored on, and yesterday's model meets today's log first.
Rows that were written stay as they are (hard links). An id that enters a vocabulary now is unknown in older rows.
"""

import dataclasses
import os
import pathlib
import reprlib
import shutil
import types
import typing

import ibis
import ibis.expr.types as ir

from data_pipeline import (
    canonical,
    engine,
    fingerprint,
    holdout,
    progress,
    sequences,
    sources,
    splits,
    validate,
    vocab,
    write,
)
from data_pipeline.options import BuildOptions
from gpsd_dist import schema

CHAIN = "chain"
BOUNDARIES = "boundaries_s"


class Bounds(typing.NamedTuple):
    """Where the splits of a data set lie, epoch seconds."""

    valid_from: int
    test_from: int
    test_until: int


def build(options: BuildOptions, source: types.ModuleType, command: str) -> None:
    """Writes the data set of the next day to options.out_dir. ValueError for every problem of the input."""
    parent_dir = options.append_to
    parent = schema.read_manifest(parent_dir)
    parent_sha256 = fingerprint.file_sha256(parent_dir / schema.MANIFEST_NAME)
    options = sources.complete(source, holdout.as_built(options, parent, parent_dir))
    files = source.find_files(options)
    prints = fingerprint.describe(files, {"append": True}, options.source)
    if not options.force and _is_current(options.out_dir, parent_dir, parent_sha256, prints["fingerprint"]):
        progress.say(f"{options.out_dir} is up to date: same raw files and pipeline code; nothing to do")
        return
    bounds = bounds_of(parent, parent_dir)
    progress.say(f"append to {parent_dir}, {options.source} -> {options.out_dir}")
    with write.staged(options.out_dir) as aside, engine.scratch(options, options.out_dir.parent) as running:
        log = source.read(running, files, options)
        day = _Day(running, log, parent, parent_dir, bounds, options)
        step = {
            "parent": str(parent_dir),
            "parent_manifest_sha256": parent_sha256,
            "fingerprint": prints["fingerprint"],
            "command": command,
            "sources": list(prints["sources"]),
            "tables": [dataclasses.asdict(table) for table in parent.tables],
        }
        schema.write_manifest(day.write(aside, step), aside)
        validate.check(aside)


def bounds_of(manifest: schema.Manifest, folder: pathlib.Path) -> Bounds:
    """The boundaries that the data set was cut by. ValueError if it was not cut by time, or does not say so rightly."""
    found = manifest.options.get(BOUNDARIES)
    if not found:
        raise ValueError(
            f"{folder} cannot be appended to: its splits are not cut by time (rule "
            f"{manifest.options.get('split_rule')}), or it was built by an older version; build it again"
        )
    is_right = isinstance(found, list) and len(found) == 3 and all(type(bound) is int for bound in found)
    if not is_right or not found[0] <= found[1] <= found[2]:
        raise ValueError(
            f"{folder / schema.MANIFEST_NAME}: options.{BOUNDARIES} is {reprlib.repr(found)}, expected three times in "
            "epoch seconds, none before the one before it; build the data set again"
        )
    return Bounds(*found)


def bounds_of_log(log: canonical.Log) -> Bounds:
    """Those of a log that is cut by time; without an end, the test period ends with the last exposure."""
    rule = log.split
    until = rule.test_until_s
    if until is None:  # not the largest request time: a request has the time of the first of its exposures
        until = int(log.exposures.time_s.max().execute()) + 1
    return Bounds(rule.valid_from_s, rule.test_from_s, until)


def _is_current(out_dir: pathlib.Path, parent_dir: pathlib.Path, parent_sha256: str, print_now: str) -> bool:
    if not (out_dir / schema.MANIFEST_NAME).is_file():
        return False
    chain = schema.read_manifest(out_dir).options.get(CHAIN, [])
    if not chain or chain[-1].get("fingerprint") != print_now:
        return False
    return out_dir.resolve() == parent_dir.resolve() or chain[-1].get("parent_manifest_sha256") == parent_sha256


class _Day:
    """One append: the log with moved boundaries, and what its rows are made of."""

    def __init__(
        self,
        running: engine.Engine,
        log: canonical.Log,
        parent: schema.Manifest,
        parent_dir: pathlib.Path,
        old: Bounds,
        options: BuildOptions,
    ):
        canonical.check(log)
        holdout.check_same_contract(log, parent, parent_dir)
        self.running, self.parent, self.parent_dir, self.old, self.options = running, parent, parent_dir, old, options
        _check_old_exposures(log, parent, parent_dir, old)
        assert isinstance(log.split, canonical.TimeBoundaries)  # the parent has boundaries, and is of the same source
        words = f"appended: train < {old.test_from} <= valid < {old.test_until} <= test (epoch s)"
        rule = dataclasses.replace(
            log.split, valid_from_s=old.test_from, test_from_s=old.test_until, test_until_s=None, words=words
        )
        self.log = dataclasses.replace(log, split=rule)
        self.events = splits.number_events(running, self.log, max(options.num_buckets, 1))
        self.cut = splits.cut(running, self.log, self.events, is_holdout=False)

    def write(self, root: pathlib.Path, step: dict) -> schema.Manifest:
        """Everything of the new data set but its manifest, which it returns. `step`: entry of the chain so far."""
        chain = self.parent.options.get(CHAIN, [])
        folder = f"appended-{len(chain) + 1:04d}"
        for split in self.parent.splits:
            if split.name != holdout.NAME:
                _link(split.files, self.parent_dir, root)
        vocabs, tables = self._vocabularies(root)
        manifest = dataclasses.replace(self.parent, tables=tables)
        encoder = sequences.Encoder(self.running, self.log, vocabs)
        items = encoder.items()
        day = self.cut.candidates.filter(self.cut.candidates.split == "test")
        lengths = self._new_lengths()
        users = day.select("user_id").union(lengths.select("user_id")).distinct()
        events = self.events.filter(self.events.user_id.isin(users.user_id))
        inputs = sequences.Inputs(events, lengths, day, items, encoder.users())
        pretrain, requests = sequences.rows_in_buckets(
            encoder, inputs, self.parent.max_history_length, max(self.options.num_buckets, 1)
        )
        added = [
            self._write_split(rows, f"{folder}{ending}", name, manifest, root)
            for rows, name, ending in ((pretrain, "pretrain", "-pretrain"), (requests, "test", ""))
        ]
        item_features = tuple(spec.feature() for spec in self.log.features if spec.origin == "items")
        rows = sequences.item_rows(encoder, items)
        write.write_items(self.running, rows, item_features, root / "items.parquet", self.options.compression)
        boundaries = list(bounds_of_log(self.log))
        grown = {t.name: t.num_rows - self.parent.table(t.name).num_rows for t in tables}
        options = {name: value for name, value in self.parent.options.items() if name != holdout.NAME}
        step = step | {"new_rows": grown, "test_rows": added[1].num_rows}
        for name, num in grown.items():
            progress.say(f"  table {name:<24} {num:>11,} new rows")
        return dataclasses.replace(
            manifest,
            splits=self._moved(*added),
            split_rule=f"{self.cut.words}; order of events: {self.log.order_words}",
            skipped={**self.log.skipped, **self.cut.skipped},
            options=options | {CHAIN: [*chain, step], BOUNDARIES: boundaries},
        )

    def _vocabularies(self, root: pathlib.Path) -> tuple[dict[str, ir.Table], tuple[schema.Table, ...]]:
        vocabs, tables = {}, []
        for name, (counts, min_count) in sequences.occurrences(self.log, self.cut).items():
            table = self.parent.table(name)
            if name in self.parent.unbounded:
                tables.append(table)
                continue
            old = holdout.read_vocabulary(self.running, table, self.parent_dir)
            least = self.options.min_count if min_count is None else min_count
            vocabs[name] = vocab.grow(self.running, name, counts, least, old, table.num_rows)
            tables.append(
                schema.Table(name, *vocab.write(self.running, vocabs[name], root / "vocab" / f"{name}.parquet"))
            )
        return vocabs, tuple(tables)

    def _new_lengths(self) -> ir.Table:
        """`Cut.pretrain` of the users who have events in the period that training just gained."""
        if self.log.split.pretrain_until_s is not None:
            return self.cut.pretrain.filter(ibis.literal(False))  # the source ends pretraining at a fixed time
        events = self.events
        fresh = events.filter((events.known_s >= self.old.valid_from) & (events.known_s < self.old.test_from))
        return self.cut.pretrain.filter(self.cut.pretrain.user_id.isin(fresh.select("user_id").distinct().user_id))

    def _write_split(
        self, rows: ir.Table, folder: str, name: str, manifest: schema.Manifest, root: pathlib.Path
    ) -> schema.Split:
        split = write.write_split(
            self.running,
            rows,
            folder,
            schema.arrow_schema(manifest, name),
            root,
            row_group_rows=self.options.row_group_rows,
            file_rows=self.options.file_rows,
            compression=self.options.compression,
        )
        return dataclasses.replace(split, name=name)

    def _moved(self, pretrain: schema.Split, test: schema.Split) -> tuple[schema.Split, ...]:
        """The pretraining rows with the new ones; train and valid as one; the old test as valid; the day as test."""
        parent = self.parent
        old = parent.split("pretrain")
        longer = dataclasses.replace(
            old,
            files=(*old.files, *pretrain.files),
            num_rows=old.num_rows + pretrain.num_rows,
            num_history_tokens=old.num_history_tokens + pretrain.num_history_tokens,
        )
        train = dataclasses.replace(parent.split("train+valid"), name="train")
        return longer, train, dataclasses.replace(parent.split("test"), name="valid"), test


def _check_old_exposures(log: canonical.Log, parent: schema.Manifest, parent_dir: pathlib.Path, old: Bounds) -> None:
    """ValueError unless the log holds the exposures that the parent was made of, and later ones."""
    num_old, num_later = holdout.exposures_around(log, old.test_until)
    if not num_later:
        raise ValueError(
            f"no exposure lies at or after {old.test_until} (epoch s), the end of the test period of {parent_dir}; "
            "--append_to needs a later log"
        )
    holdout.check_old_exposures(num_old, parent, parent_dir, old.test_until)


def _link(files: tuple[str, ...], parent_dir: pathlib.Path, root: pathlib.Path) -> None:
    """The parent's part files under the same names; copies where the file system has no hard links."""
    for name in files:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(parent_dir / name, target)
        except OSError:
            shutil.copy2(parent_dir / name, target)
