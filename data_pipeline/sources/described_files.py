"""Opens the files of a `log_description.LogDescription` and checks them: raw columns -> canonical columns."""

import pathlib

import ibis
import ibis.expr.types as ir

from data_pipeline import raw_files
from data_pipeline.engine import Engine
from data_pipeline.sources import json_lines, log_description

FILE_STRIDE = 1 << 40  # rows per file: `order` = file number * stride + place in the file
_UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
_TEXT_ENDINGS = (".csv", ".tsv", ".txt", ".dat")
_LAST_SECOND = 253_402_300_800  # the year 10000: a larger epoch second is milliseconds by mistake
_HAS_OFFSET = r"[T ].*(Z|[+-]\d\d(:?\d\d)?)$"


@ibis.udf.scalar.builtin(name="timezone")
def _utc_of_local(zone: str, moment: ibis.dtype("timestamp")) -> ibis.dtype("timestamp('UTC')"):
    """Finds the instant at which a clock in `zone` shows `moment`."""


@ibis.udf.scalar.builtin
def string_split(text: str, separator: str) -> list[str]:
    """Splits a text by a plain separator: Ibis' own `split` takes "|" for a pattern on Spark."""


def find(raw_dir: pathlib.Path, section: str, pattern: str) -> dict[str, pathlib.Path]:
    """Finds the files that fit the pattern: {"section/relative path": path}, by name. ValueError if none does."""
    if not raw_dir.is_dir():
        raise ValueError(f"{raw_dir} is not a folder; --raw_dir is where the files of the schema are")
    if pathlib.PurePath(pattern).is_absolute() or ".." in pathlib.PurePath(pattern).parts:
        raise ValueError(f"[{section}] files = {pattern!r} leaves the folder {raw_dir}; give a pattern relative to it")
    paths = sorted(path for path in raw_dir.glob(pattern) if path.is_file())
    if not paths:
        found = sorted(path.name for path in raw_dir.iterdir())[:20]
        raise ValueError(
            f"[{section}] files = {pattern!r}: no such file in {raw_dir}, which holds {found}; correct the pattern"
        )
    for path in paths:
        ending = [suffix for suffix in path.suffixes if suffix != ".gz"][-1:]
        if (
            not json_lines.is_json_lines(path)
            and ending != [".parquet"]
            and (not ending or ending[0] not in _TEXT_ENDINGS)
        ):
            raise ValueError(
                f"{path}: the ending is none of {_TEXT_ENDINGS}, .json, .jsonl, .ndjson, .parquet; rename the file"
            )
        raw_files.require_file(path, f"[{section}]")
    return {f"{section}/{path.relative_to(raw_dir)}": path for path in paths}


class Reader:
    """Makes canonical tables of the described files. Every method counts the raw rows it leaves out in `skipped`."""

    def __init__(self, engine: Engine, files: dict[str, pathlib.Path], description: log_description.LogDescription):
        """Takes the `files` that `find` returned for all sections together."""
        self.engine = engine
        self.files = files
        self.description = description

    def events(self, skipped: dict[str, int]) -> ir.Table:
        """Reads user_id, item_id, time_s, order and the features of the event."""
        log = self.description.history
        columns = {log.user: "string", log.item: "string"} | ({log.event: "string"} if log.event else {})
        rows = self._complete(
            self._read("history", columns, log.feature, log), "history", ("user_id", "item_id", "time_s"), skipped
        )
        if log.event_types:
            counts = rows.filter(rows["raw:" + log.event].isin(log.event_types))
            others = int(rows.count().execute()) - int(counts.count().execute())
            if not counts.count().execute():
                found = sorted(str(value) for value in rows["raw:" + log.event].topk(10).execute().iloc[:, 0])
                raise ValueError(
                    f"[history] event_types {list(log.event_types)} fit no row; column {log.event!r} holds {found}"
                )
            _count(skipped, "history rows of other event types", others)
            rows = counts
        return rows.select("user_id", "item_id", "time_s", "order", *[feature.label for feature in log.feature])

    def exposures(self, skipped: dict[str, int]) -> ir.Table:
        """Reads user_id, item_id, time_s, order, the tasks and the features of the exposure."""
        log = self.description.exposure
        columns = {log.user: "string", log.item: "string"} | {task.column: "float64" for task in log.task}
        if log.request:
            columns[log.request] = "string"
        rows = self._complete(
            self._read("exposure", columns, log.feature, log), "exposure", ("user_id", "item_id", "time_s"), skipped
        )
        rows = rows.mutate(**{task.label: rows["raw:" + task.column] for task in log.task})
        if log.request:  # all rows of a request must see the same history
            together = ibis.window(group_by=["user_id", "raw:" + log.request])
            shown_s = ibis.ifelse(rows["raw:" + log.request].isnull(), rows.time_s, rows.time_s.min().over(together))
            rows = rows.mutate(time_s=shown_s)
        names = [task.label for task in log.task] + [feature.label for feature in log.feature]
        return self.engine.materialise("raw_exposures", rows.select("user_id", "item_id", "time_s", "order", *names))

    def items(self, skipped: dict[str, int]) -> ir.Table | None:
        """Reads item_id and the item features; returns None where nothing is described."""
        part = self.description.items
        if part is None:
            return None
        if part.files:
            rows = self._complete(
                self._read("items", {part.item: "string"}, part.feature), "items", ("item_id",), skipped
            )
            return self._unique(rows, "items", "item_id", part.feature)
        log = self.description.history
        rows = self._read("history", {log.user: "string", log.item: "string"}, part.feature, log).filter(
            lambda t: t.item_id.notnull()
        )
        latest_first = ibis.window(group_by="item_id", order_by=[rows.time_s.desc(), rows.order.desc()])
        latest = rows.mutate(place=ibis.row_number().over(latest_first)).filter(lambda t: t.place == 0)
        return self.engine.materialise(
            "items_of_log", latest.select("item_id", *[feature.label for feature in part.feature])
        )

    def users(self, skipped: dict[str, int]) -> ir.Table:
        """Reads user_id and the user features."""
        part = self.description.users
        rows = self._complete(self._read("users", {part.user: "string"}, part.feature), "users", ("user_id",), skipped)
        return self._unique(rows, "users", "user_id", part.feature)

    def _read(self, section: str, columns: dict[str, str], features, log=None) -> ir.Table:
        """Reads all files of a section.

        Columns: `raw:<column>`, features by label, user_id, item_id, order, and time_s of a log.
        """
        part = getattr(self.description, section)
        tables = []
        paths = [path for name, path in self.files.items() if name.startswith(section + "/")]
        for number, path in enumerate(paths):
            table = self._read_file(path, columns, features, log)
            order = table[raw_files.FILE_ORDER] + ibis.literal(number * FILE_STRIDE, type="int64")
            keys = {"order": order.cast("int64")}
            if hasattr(part, "user"):
                keys["user_id"] = table["raw:" + part.user]
            if hasattr(part, "item"):
                keys["item_id"] = table["raw:" + part.item]
            tables.append(table.mutate(**keys).drop(raw_files.FILE_ORDER))
        return tables[0].union(*tables[1:]) if len(tables) > 1 else tables[0]

    def _read_file(self, path: pathlib.Path, columns: dict[str, str], features, log) -> ir.Table:
        kinds = dict(columns)
        for feature in features:
            kinds[feature.column] = self._raw_kind(path, feature)
        if log is not None:
            kinds[log.time] = "string" if log.time_unit == "iso" else "int64"
        raw = self._open(path, kinds)
        if log is not None and hasattr(log, "task"):
            for task in log.task:
                raw_files.require_one_of(path, raw, task.column, (0.0, 1.0))
        values = {"raw:" + name: raw[name] for name in columns}
        values |= {feature.label: _feature_value(raw[feature.column], feature) for feature in features}
        if log is not None:
            values["time_s"] = self._time_s(path, raw, log)
        return raw.select(raw_files.FILE_ORDER, **values)

    def _open(self, path: pathlib.Path, kinds: dict[str, str]) -> ir.Table:
        if json_lines.is_json_lines(path):
            return json_lines.read_columns(self.engine, path, kinds)[0]
        style = self.description.csv
        header = None if style.header else list(style.columns)
        return raw_files.read_columns(self.engine, path, kinds, separator=style.separator, header=header)

    def _raw_kind(self, path: pathlib.Path, feature: log_description.FeatureColumn) -> str:
        """Decides the type in the file: a bag is a list column, or a string with a separator."""
        if feature.kind != "bag":
            return "float64" if feature.kind == "numerical" else "string"
        if feature.separator:
            return "string"
        if path.suffix != ".parquet" and not json_lines.is_json_lines(path):
            raise ValueError(
                f"{path}, column {feature.column!r}: a bag in a text file needs a `separator` in the schema"
            )
        return "array<string>"

    def _time_s(self, path: pathlib.Path, raw: ir.Table, log) -> ir.Value:
        """Computes epoch seconds; ValueError for text that is no ISO time, or numbers of another unit."""
        if log.time_unit != "iso":
            seconds = raw[log.time] // _UNITS_PER_SECOND[log.time_unit]
            wrong = raw.filter((seconds < 0) | (seconds >= _LAST_SECOND))
            expected = f"an epoch time in {log.time_unit} before the year 10000"
            raw_files.require_none(path, wrong, log.time, expected, "correct `time_unit` in the schema, or the values")
            return seconds.cast("int64")
        text = raw[log.time]
        local = _utc_of_local(self.description.split.time_zone, text.try_cast("timestamp"))
        moment = ibis.ifelse(text.re_search(_HAS_OFFSET), text.try_cast("timestamp('UTC')"), local)
        wrong = raw.filter(text.notnull() & moment.isnull())
        raw_files.require_none(
            path, wrong, log.time, "an ISO time such as 2024-05-01T13:30:00+02:00", "correct `time_unit`"
        )
        return moment.epoch_seconds().cast("int64")

    def _complete(self, rows: ir.Table, section: str, needed: tuple[str, ...], skipped: dict[str, int]) -> ir.Table:
        """Stores the rows that have every key, and counts the others."""
        rows = self.engine.materialise(f"raw_{section}", rows)
        for name in needed:
            _count(skipped, f"{section} rows without {name}", int(rows[name].isnull().sum().fill_null(0).execute()))
            rows = rows.filter(rows[name].notnull())
        if not rows.count().execute():
            raise ValueError(f"[{section}]: every row lacks one of {needed}; check the columns that the schema names")
        return rows

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


def _feature_value(column: ir.Value, feature: log_description.FeatureColumn) -> ir.Value:
    if feature.kind == "bag" and feature.separator:
        parts = string_split(column, feature.separator).map(lambda part: part.strip())
        return parts.filter(lambda part: part.length() > 0)
    return column


def _count(skipped: dict[str, int], reason: str, num: int) -> None:
    if num:
        skipped[reason] = skipped.get(reason, 0) + num
