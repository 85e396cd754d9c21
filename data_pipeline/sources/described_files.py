"""Opens the files of a `log_description.LogDescription` and checks them: raw columns -> canonical columns."""

import collections
import dataclasses
import fnmatch
import pathlib
import typing
import urllib.parse

import ibis
import ibis.expr.operations as ops
import ibis.expr.types as ir

from data_pipeline import progress, raw_files, raw_values
from data_pipeline.engine import Engine
from data_pipeline.raw_values import KINDS, Kind, Notes
from data_pipeline.sources import json_lines, log_description
from gpsd_dist.features import Rules

ROWS, SECTIONS = 1 << 39, 8
"""`order` = (microsecond of the second * SECTIONS + number of the section) * ROWS + place of the row in it."""
_TEXT_ENDINGS = (".csv", ".tsv", ".txt", ".dat")
GIVES_AWAY_AUC = 0.95  # the leak threshold of `inspect`
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def find(raw_dir: pathlib.Path, section: str, pattern: str) -> dict[str, pathlib.Path]:
    """Finds the files that fit the pattern: {"section/relative path": path}, by name. ValueError if none does.

    A folder stands for the files in it. What begins with "." or "_" is left out, as tools mark their own files so,
    unless the pattern names it.
    """
    if not raw_dir.is_dir():
        raise ValueError(f"{raw_dir} is not a folder; --raw_dir is where the files of the schema are")
    if pathlib.PurePath(pattern).is_absolute() or ".." in pathlib.PurePath(pattern).parts:
        raise ValueError(f"[{section}] files = {pattern!r} leaves the folder {raw_dir}; give a pattern relative to it")
    fitting = _fitting(raw_dir, section, pattern)
    hidden = [path for path in fitting if _is_hidden(path.relative_to(raw_dir), pattern)]
    paths = [path for path in fitting if path not in hidden]
    if hidden:
        names = ", ".join(str(path.relative_to(raw_dir)) for path in hidden[:5])
        progress.warn(f"[{section}]: {len(hidden)} hidden files are left out (names with . or _ in front): {names}")
    if not paths and (raw_dir / pattern).is_dir():
        raise ValueError(
            f"[{section}] files = {pattern!r} is a folder without a table in it (.csv, .json, .parquet, ...); name the "
            "one that has the log"
        )
    if not paths:
        found = sorted(path.name for path in raw_dir.iterdir())[:20]
        raise ValueError(
            f"[{section}] files = {pattern!r}: no such file in {raw_dir}, which holds {found}; correct the pattern"
        )
    for path in paths:
        if not _is_table(path):
            raise ValueError(
                f"{path}: the ending is none of {_TEXT_ENDINGS}, .json, .jsonl, .ndjson, .parquet; rename the file, or "
                f"correct [{section}] files = {pattern!r}"
            )
    return {f"{section}/{path.relative_to(raw_dir)}": path for path in paths}


def _fitting(raw_dir: pathlib.Path, section: str, pattern: str) -> list[pathlib.Path]:
    """Lists the files of that name or pattern by name; those below it, where only folders fit."""
    named, fitting = raw_dir / pattern, []
    if pathlib.PurePath(pattern).parts:  # not of ".", which is the whole folder
        fitting = sorted(path for path in raw_dir.glob(pattern) if path.suffix != ".toml" or path == named)
    if named.exists():
        if [path for path in fitting if path != named]:
            raise ValueError(
                f"[{section}] files = {pattern!r} is the name of a file in {raw_dir}, and as a pattern it fits "
                f"{[path.name for path in fitting[:5]]}; write [*] for a star, [?] for a question mark and [[] for a "
                "bracket that belong to a name"
            )
        fitting = [named]
    files = [path for path in fitting if path.is_file()]
    if files or not fitting:
        return files
    below = sorted(path for folder in fitting for path in folder.rglob("*") if path.is_file())
    others = [str(path.relative_to(raw_dir)) for path in below if not _is_table(path) and path.name[0] not in "._"]
    if others:
        progress.warn(f"[{section}]: {len(others)} files of other kinds are left out: {', '.join(others[:5])}")
    return [path for path in below if _is_table(path)]


def _is_table(path: pathlib.Path) -> bool:
    ending = [suffix for suffix in path.suffixes if suffix != ".gz"][-1:]
    is_text = bool(ending) and ending[0] in _TEXT_ENDINGS
    return is_text or path.suffix == ".parquet" or json_lines.is_json_lines(path)


def _is_hidden(path: pathlib.PurePath, pattern: str) -> bool:
    asked = [part for part in pathlib.PurePath(pattern).parts if part[0] in "._"]
    return any(
        part[0] in "._" and not any(part == name or fnmatch.fnmatchcase(part, name) for name in asked)
        for part in path.parts
    )


class Reader:
    """Makes canonical tables of the described files. Every method counts the raw rows it leaves out in `skipped`."""

    def __init__(
        self,
        engine: Engine,
        files: dict[str, pathlib.Path],
        description: log_description.LogDescription,
        known: Rules | None = None,
    ):
        """Takes the `files` that `find` returned for all sections together; `known`: how earlier rows were read."""
        self._known_clips = {} if known is None else known.clip
        self.engine = engine
        self.files = files
        self.description = description
        style = description.csv
        self._clips: dict[str, list[float]] = {}
        self._whole: set[str] = set()
        self._style = raw_files.TextStyle(style.separator, style.columns, style.quote, style.escape)

    def events(self, skipped: dict[str, int]) -> ir.Table:
        """Reads user_id, item_id, time_s, order and the features of the event."""
        log = self.description.history
        columns = {"raw:event": _of(log.event, "string")} if log.event else {}
        rows = self._complete(self._read("history", columns), "history", ("user_id", "item_id", "time_us"), skipped)
        if log.event_types:
            counts = rows.filter(rows["raw:event"].isin(log.event_types))
            others = int(rows.count().execute()) - int(counts.count().execute())
            if not counts.count().execute():
                found = sorted(str(value) for value in rows["raw:event"].topk(10).execute().iloc[:, 0])
                raise ValueError(
                    f"[history] event_types {list(log.event_types)} fit no row; column {log.event!r} holds {found}"
                )
            _count(skipped, "history rows of other event types", others)
            rows = counts
        rows = self._once(rows, "history", skipped)
        return _timed(rows).select("user_id", "item_id", "time_s", "order", *_labels(log.feature))

    def exposures(self, skipped: dict[str, int]) -> ir.Table:
        """Reads user_id, item_id, time_s, order, the tasks and the features of the exposure."""
        log = self.description.exposure
        columns = {f"raw:task:{task.label}": _of(task.column, "label") for task in log.task}
        sampling = {f"sampling_{name}": value for name, value in self.description.sampling().items()}
        columns |= {
            name: _of(value, "rate" if name.endswith("rate") else "weight")
            for name, value in sampling.items()
            if isinstance(value, str)
        }
        if log.request:
            columns["raw:request"] = _of(log.request, "string")
        rows = self._complete(self._read("exposure", columns), "exposure", ("user_id", "item_id", "time_us"), skipped)
        rows = self._once(rows, "exposure", skipped)
        rows = rows.mutate(**{task.label: rows[f"raw:task:{task.label}"] for task in log.task})
        if log.request:  # all rows of a request must see the same history
            together = ibis.window(group_by=["user_id", "raw:request"])
            shown_us = ibis.ifelse(rows["raw:request"].isnull(), rows.time_us, rows.time_us.min().over(together))
            rows = rows.mutate(time_us=shown_us)
        fixed = {name: ibis.literal(value) for name, value in sampling.items() if not isinstance(value, str)}
        rows = rows.mutate(**fixed) if fixed else rows
        if "sampling_negative_rate" in columns:
            self._check_rates(rows)
        names = [task.label for task in log.task] + _labels(log.feature) + list(sampling)
        rows = _timed(rows).select("user_id", "item_id", "time_s", "order", *names)
        return self.engine.materialise("raw_exposures", rows)

    def _check_rates(self, rows: ir.Table) -> None:
        """Refuses rates that give the label away, such as 1 in the rows with a positive label and less in others."""
        log = self.description.exposure
        step = (rows["sampling_negative_rate"].ln() * 100).round().cast("int64")  # few groups, whatever was drawn
        for task in (task for task in log.task if not task.given):
            label = rows[task.label]
            counts = rows.group_by(step=step).agg(positive=(label == 1).sum(), negative=(label == 0).sum())
            found = counts.order_by("step").execute().fillna(0)
            positive, negative = (found[name].to_numpy(float) for name in ("positive", "negative"))
            pairs = positive.sum() * negative.sum()
            auc = (positive * (negative.cumsum() - negative / 2)).sum() / pairs if pairs else 0.5
            if max(auc, 1 - auc) > GIVES_AWAY_AUC:
                raise ValueError(
                    f"[exposure] column {log.negative_sampling_rate!r} alone tells the rows where {task.label!r} is 1 "
                    f"from those where it is 0 (AUC {auc:.3f}), so it would give the label away: a positive row needs "
                    "the rate of a negative in its place"
                )

    def items(self, skipped: dict[str, int]) -> ir.Table | None:
        """Reads item_id and the item features; returns None where nothing is described."""
        part = self.description.items
        if part is None:
            return None
        if part.files:
            rows = self._complete(self._read("items", {}), "items", ("item_id",), skipped)
            return self._unique(rows, "items", "item_id", part.feature)
        rows = self._read("history", {}, part.feature).filter(lambda t: t.item_id.notnull())
        place = ibis.row_number().over(ibis.window(group_by="item_id", order_by=[rows.time_us, rows["order"]]))
        rows = self.engine.materialise("attributes_of_log", rows.mutate(place=place))
        latest = {name: rows[name].argmax(rows.place, where=rows[name].notnull()) for name in _labels(part.feature)}
        return self.engine.materialise("items_of_log", rows.group_by("item_id").agg(**latest))

    def users(self, skipped: dict[str, int]) -> ir.Table:
        """Reads user_id and the user features."""
        part = self.description.users
        rows = self._complete(self._read("users", {}), "users", ("user_id",), skipped)
        return self._unique(rows, "users", "user_id", part.feature)

    def reading(self) -> dict[str, typing.Any]:
        """Says what was done to values beyond their type, once every section is read."""
        found = {"null_words": list(self.description.csv.null_words), "whole": sorted(self._whole), "clip": self._clips}
        return {name: value for name, value in found.items() if value}

    def _read(self, section: str, columns: dict[str, Kind], features=None) -> ir.Table:
        """Reads all files of a section: `columns`, features by label, `order`, and as it has them user_id, item_id and
        time_us.

        Files without rows are named, and left out.
        """
        part = getattr(self.description, section)
        kinds = columns | {f.label: _feature_kind(f) for f in (part.feature if features is None else features)}
        for name, role in (("user_id", "user"), ("item_id", "item")):
            if hasattr(part, role):
                kinds[name] = _of(getattr(part, role), "string")
        if getattr(part, "time", "") and getattr(part, "order_only", False):
            kinds["time_us"] = _of(part.time, "place")
        elif hasattr(part, "time") and part.time:
            kind = raw_values.time_kind(part.time_unit, self.description.split.time_zone)
            kinds["time_us"] = dataclasses.replace(kind, column=part.time)
        tables, notes, start, lacking = [], {name: Notes() for name in kinds}, 0, collections.defaultdict(list)
        paths = [path for name, path in self.files.items() if name.startswith(section + "/")]
        for path in paths:
            found = self._read_file(path, kinds, part.partition_columns)
            if found.num_rows:
                place = found.table[raw_files.FILE_ORDER] + ibis.literal(start, type="int64")
                tables.append(found.table.mutate(order=place.cast("int64")).drop(raw_files.FILE_ORDER))
                start += found.end
                for column in found.missing:
                    lacking[column].append((path, found.keys))
            else:
                progress.warn(f"[{section}]: {path} has no rows")
            for name in kinds:
                notes[name].add(found.notes[name])
        if not tables:
            raise ValueError(
                f"[{section}] files = {part.files!r}: no row in {len(paths)} file{'s' * (len(paths) > 1)}, such as "
                f"{paths[0]}, which is empty or has only a header; it should hold the columns "
                f"{[*dict.fromkeys(kind.column for kind in kinds.values())]}"
            )
        self._check_lacking(section, lacking, len(tables))
        rows = tables[0].union(*tables[1:]) if len(tables) > 1 else tables[0]
        if hasattr(part, "time") and not part.time:  # then the order of the rows is all there is
            rows = rows.mutate(time_us=ibis.literal(0, type="int64"))
        return self._one_spelling(section, rows, kinds, notes)

    def _check_lacking(self, section: str, lacking: dict[str, list], num_files: int) -> None:
        """Warns of keys that occur in no line of some JSON files. ValueError for a key that occurs in no file."""
        for column, files in lacking.items():
            path, keys = files[0]
            words = f"[{section}]: no line of {path} has the key {column!r} ({len(files)} of {num_files} files)"
            if len(files) == num_files:
                raise ValueError(f"{words}; the keys of its first line are {list(keys)}: correct the name")
            progress.warn(f"{words}: it is missing there")

    def _read_file(self, path: pathlib.Path, kinds: dict[str, Kind], asked: tuple[str, ...]) -> raw_files.RawFile:
        constants, null_words = self._partitions(path, asked), self.description.csv.null_words
        if not path.stat().st_size:
            return raw_files.store(self.engine, path, iter(()), kinds)
        if json_lines.is_json_lines(path):
            # A writer leaves out keys that are null: a shard may have no line with one. But every row needs its ids.
            optional = tuple(k.column for name, k in kinds.items() if name not in ("user_id", "item_id", "time_us"))
            return json_lines.read(
                self.engine, path, kinds, optional=optional, constants=constants, null_words=null_words
            )[0]
        return raw_files.read(
            self.engine,
            path,
            kinds,
            style=self._style,
            constants=constants,
            null_words=null_words,
            decimal=self.description.csv.decimal,
        )

    def _partitions(self, path: pathlib.Path, asked: tuple[str, ...]) -> dict[str, str | None]:
        """Reads the folders named key=value between --raw_dir and the file; a file's own column goes first."""
        name = next(name for name, known in self.files.items() if known == path)
        pairs = [part.partition("=") for part in pathlib.PurePath(name).parts[1:-1] if "=" in part]
        found = {key: None if value == _NO_PARTITION else urllib.parse.unquote(value) for key, _, value in pairs}
        missing = [column for column in asked if column not in found]
        if missing:
            raise ValueError(
                f"{path} lies in no folder {missing[0]}=VALUE, which `partition_columns` names; below --raw_dir it "
                f"lies in {name.partition('/')[2]!r}: correct `partition_columns`, or --raw_dir"
            )
        return found

    def _one_spelling(self, section: str, rows: ir.Table, kinds: dict[str, Kind], notes: dict[str, Notes]) -> ir.Table:
        """Spells 101.0 as 101 in columns of whole numbers only, and warns of what looks wrong with the values."""
        for name, kind in kinds.items():
            seen, where = notes[name], f"[{section}] column {kind.column!r}"
            for word, count in seen.missing.items():
                progress.warn(f"{where}: {count:,} values {word!r} are read as missing (`null_words` in [csv])")
            if seen.num_zoned and seen.num_local:
                progress.warn(
                    f"{where}: {seen.num_local:,} times name no zone and are taken as "
                    f"{self.description.split.time_zone}, {seen.num_zoned:,} others name one"
                )
            if seen.num_far_times:
                progress.warn(f"{where}: {seen.num_far_times:,} times lie before 1990 or after 2100")
            if name in ("user_id", "item_id"):
                for word, count in seen.suspects.items():
                    progress.warn(
                        f"{where}: {count:,} values {word!r} are taken as an id; add it to `null_words` in [csv] if it "
                        "stands for a missing value"
                    )
                if seen.num_invisible:
                    progress.warn(
                        f"{where}: {seen.num_invisible:,} values hold letters that nobody sees, such as a zero-width "
                        "space: they make two ids of one; remove them in the file"
                    )
                if seen.num_rounded:
                    progress.warn(f"{where}: {seen.num_rounded:,} values such as 1.2e+18 have lost digits in a float")
            if seen.num_point_zero and seen.num_whole + seen.num_point_zero == seen.num_values:
                if kind.convert is KINDS["string"].convert:
                    progress.warn(
                        f"{where}: whole numbers such as 101.0 are spelled 101 ({seen.num_point_zero:,} values)"
                    )
                    rows = rows.mutate(**{name: rows[name].re_replace(r"\.0+$", "")})
                    self._whole.add("item" if name == "item_id" else name)
        return rows

    def _complete(self, rows: ir.Table, section: str, needed: tuple[str, ...], skipped: dict[str, int]) -> ir.Table:
        """Selects the rows that have every key, and counts the others."""
        if rows.op().find((ops.Union, ops.RegexReplace)):  # else it is one stored table, whatever was cast
            rows = self.engine.materialise(f"raw_{section}", rows)
        is_whole, lacks = ibis.literal(True), {}
        for name in needed:
            lacks[name] = (is_whole & rows[name].isnull()).sum().fill_null(0)
            is_whole &= rows[name].notnull()
        counts = rows.agg(**lacks, num=is_whole.sum().fill_null(0)).execute().iloc[0]
        for name in needed:
            _count(skipped, f"{section} rows without {name}", int(counts[name]))
        rows = rows.filter(is_whole)
        if not counts["num"]:
            raise ValueError(f"[{section}]: every row lacks one of {needed}; check the columns that the schema names")
        for feature in getattr(self.description, section).feature:
            if feature.clip_quantile:
                rows = self._clipped(rows, feature)
        return rows

    def _clipped(self, rows: ir.Table, feature: log_description.FeatureColumn) -> ir.Table:
        """Cuts a number off at the quantiles that the schema asks for, those of the data set that rows are added to."""
        known = self._known_clips.get(feature.label) or self._quantiles(rows, feature, feature.clip_quantile)
        low, high = self._clips[feature.label] = [*known]
        return rows.mutate(**{feature.label: rows[feature.label].clip(low, high)})

    def _quantiles(self, rows: ir.Table, feature: log_description.FeatureColumn, share: float) -> tuple[float, float]:
        """Finds the values that have that share of all below and above them: values of the column, not means."""
        known = rows.filter(rows[feature.label].notnull()).select(value=feature.label)
        place = ibis.row_number().over(ibis.window(order_by=known.value))
        count = int(known.count().execute())
        places = (int(share * count), count - 1 - int(share * count))
        numbered = known.mutate(place=place)
        found = numbered.filter(numbered.place.isin(places)).value.execute()
        return (float(found.min()), float(found.max())) if count else (0.0, 0.0)

    def _once(self, rows: ir.Table, section: str, skipped: dict[str, int]) -> ir.Table:
        """Keeps the first of equal rows, as a log that is delivered at least once repeats them; counts the others."""
        part = getattr(self.description, section)
        if part.keep_copies or not part.time:  # without a time, an item that comes back is no copy
            return rows
        values = [name for name in rows.columns if name != "order"]
        num_rows, num_different = int(rows.count().execute()), int(rows.select(*values).distinct().count().execute())
        if num_rows == num_different:
            return rows
        _count(skipped, f"{section} rows that repeat another (`keep_copies` keeps them)", num_rows - num_different)
        return self.engine.materialise(f"{section}_once", rows.group_by(values).agg(order=rows["order"].min()))

    def _unique(self, rows: ir.Table, section: str, key: str, features) -> ir.Table:
        """Keeps one row per key: equal rows count once, differing ones are an error."""
        kept = rows.select(key, *[feature.label for feature in features]).distinct()
        twice = kept.group_by(key).agg(num=kept.count()).filter(lambda t: t.num > 1)
        if twice.count().execute():
            value = twice.order_by(key).limit(1)[key].execute().iloc[0]
            part = getattr(self.description, section)
            raise ValueError(
                f"{part.files}: {key} {value!r} has several rows with different values; leave one row for each"
            )
        return kept


def _of(column: str, kind: str) -> Kind:
    return dataclasses.replace(KINDS[kind], column=column)


def _labels(features) -> list[str]:
    return [feature.label for feature in features]


def _feature_kind(feature: log_description.FeatureColumn) -> Kind:
    if feature.kind == "bag":
        kind = raw_values.bag_kind(feature.separator) if feature.separator else KINDS["array<string>"]
        return dataclasses.replace(kind, column=feature.column)
    return _of(feature.column, "float64" if feature.kind == "numerical" else "string")


def _timed(rows: ir.Table) -> ir.Table:
    """Cuts times to seconds; what is cut off goes first in `order`."""
    part_us = (rows.time_us % 1_000_000).cast("int64")
    order = part_us * ibis.literal(SECTIONS * ROWS, type="int64") + rows["order"]
    return rows.mutate(time_s=(rows.time_us // 1_000_000).cast("int64"), order=order.cast("int64"))


def _count(skipped: dict[str, int], reason: str, num: int) -> None:
    if num:
        skipped[reason] = skipped.get(reason, 0) + num
