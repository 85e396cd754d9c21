"""Counts the events before a request: of a candidate's item, and of each attribute of the item (`--counts`).

`--rates` looks at labels instead: how often the candidate's item was clicked on the whole days before the request.

An event counts if it is strictly earlier than its request, in whole seconds: neither the label of a candidate, nor that
of another one of the same second, is in it. All candidates of a request are counted at the request's time, as a server
would. A window of 7 days takes the events from 7 days before the request on. An event without a time (`latest_s`) is in
no window, but in the total once its latest time has passed; one that may have been at any time is in none.
"""

import collections.abc
import dataclasses
import pathlib

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import canonical, options, sequences, splits
from data_pipeline.engine import Engine

FOLDER, EVENTS, ITEMS, DAYS = "counters", "events.parquet", "items.parquet", "rates.parquet"
AS_OF = b"as_of_s"
"""Key of the metadata of EVENTS: every event of the log is before it, epoch seconds."""
USER = "user"
RATES = "rates"
"""Feature that --rates makes, and that FinetuneConfig.offset may name."""
DAY_S = 86_400
_ORIGIN = "counts"


def described(log: canonical.Log, asked: options.BuildOptions) -> canonical.Log:
    """Adds the features that --counts, --user_counts and --rates ask for. ValueError where nothing can be counted."""
    sizes = options.windows(asked.counts)
    if asked.user_counts and not sizes:
        raise ValueError("--user_counts goes with --counts, which says the windows; add --counts 7d,30d,total")
    if asked.rates and log.exposures is None:
        raise ValueError("--rates needs exposures with labels, and this log has events alone; leave it out")
    if sizes and not int(log.events.time_s.count().execute()):
        raise ValueError("--counts needs events with a time, and this log has none; leave it out")
    specs = [
        canonical.FeatureSpec(
            f"count_{window}_{name}", ("candidate",), _ORIGIN, "numerical", log=True, counts=name, window_s=size_s
        )
        for name in counted(log)
        for window, size_s in sizes.items()
    ]
    specs += [
        canonical.FeatureSpec(f"count_{window}_{USER}", ("context",), _ORIGIN, "numerical", log=True, window_s=size_s)
        for window, size_s in sizes.items()
        if asked.user_counts
    ]
    if asked.rates:
        rates = canonical.FeatureSpec(RATES, ("candidate",), _ORIGIN, "numerical", counts=log.item_feature)
        specs.append(dataclasses.replace(rates, prior_exposures=asked.rates))
    twice = {spec.name for spec in specs} & {spec.name for spec in log.features}
    if twice:
        raise ValueError(
            f"--counts or --rates makes {sorted(twice)}, and the log has features of these names; rename those"
        )
    return dataclasses.replace(log, features=(*log.features, *specs))


def counted(log: canonical.Log) -> dict[str, str]:
    """Lists the features that are counted, with their columns: what is known of an item alone, but no bag."""
    shown = [spec for spec in log.specs_in("candidate") if spec.kind == "categorical" and not spec.is_bag]
    return {spec.name: spec.column for spec in shown if spec.origin in ("item_id", "items")}


def add(engine: Engine, rows: sequences.Rows) -> sequences.Rows:
    """Adds a column per feature that counts to the candidates, of all events and exposures of the log."""
    specs = [spec for spec in rows.log.features if spec.origin == _ORIGIN]
    if not specs:
        return rows
    of_request = ibis.window(group_by=splits.request_key(rows.candidates))
    shown = engine.stored("candidates_shown", rows.candidates)
    asked_s = shown.time_s.min().over(of_request).cast("int64")
    table = _with_attributes(shown.mutate(_asked_s=asked_s, _midnight_s=_midnight_s(asked_s)), rows.log)
    events = _with_attributes(_timed(rows.log), rows.log)
    for name, column in counted(rows.log).items():
        if own := _sums(spec for spec in specs if spec.counts == name and not spec.prior_exposures):
            table = _joined(table, _earlier(events, table, column, own), column, "_asked_s")
    if own := _sums(spec for spec in specs if spec.counts is None):
        asked = table.mutate(_asked_s=table["_midnight_s"])
        table = _joined(table, _earlier(events, asked, "user_id", own), "user_id", "_midnight_s")
    for spec in (spec for spec in specs if spec.prior_exposures):
        table = _with_log_odds(table, engine.materialise("exposures_by_day", _by_day(rows.log)), spec)
    table = table.select(*shown.columns, *[spec.name for spec in specs])
    return dataclasses.replace(rows, candidates=engine.materialise("candidates_counted", table))


def _midnight_s(moment_s: ir.IntegerValue) -> ir.IntegerValue:
    return (moment_s // DAY_S * DAY_S).cast("int64")


def _sums(specs: collections.abc.Iterable[canonical.FeatureSpec]) -> dict[str, tuple[str, int]]:
    """Says for each feature what is summed, and how far back: see `_earlier`."""
    return {spec.name: ("num_timed" if spec.window_s else "num", spec.window_s) for spec in specs}


def _by_day(log: canonical.Log) -> ir.Table:
    """Sums the exposures of an item by UTC day, with their weights: item_id, moment_s (midnight), clicks, others.

    An exposure counts as its loss does in training: only with a known label, and a negative of a sampled log 1 / rate
    times.
    """
    task, one = log.tasks[0], ibis.literal(1.0)  # a decimal in Spark, where its product with a label is a double
    seen = log.exposures.filter(log.exposures[task.name].notnull() & log.exposures.item_id.notnull())
    if task.given is not None:
        seen = seen.filter(seen[task.given] == 1)
    weight = seen["sampling_weight"] if "weight" in log.sampling else one
    if "negative_rate" in log.sampling and task.given is None:
        weight = weight / ibis.ifelse(seen[task.name] == 0, seen["sampling_negative_rate"], one)
    numbers = {"clicks": weight * seen[task.name], "others": weight * (1 - seen[task.name])}
    seen = seen.select("item_id", moment_s=_midnight_s(seen.time_s), **numbers)
    return seen.group_by(["item_id", "moment_s"]).agg(clicks=seen.clicks.sum(), others=seen.others.sum())


def _with_log_odds(table: ir.Table, days: ir.Table, spec: canonical.FeatureSpec) -> ir.Table:
    """Smooths an item's rate by the overall one, and that by one click in two exposures: 0.0 on the first day."""
    days, table = (part.mutate(_all=ibis.literal("")) for part in (days, table))
    asked = table.mutate(_asked_s=table["_midnight_s"])
    for column in ("item_id", "_all"):
        sums = {f"_{column}_{name}": (name, 0) for name in ("clicks", "others")}
        table = _joined(table, _earlier(days, asked, column, sums), column, "_midnight_s")
    rate = (table["__all_clicks"] + 1) / (table["__all_clicks"] + table["__all_others"] + 2)
    clicks = table["_item_id_clicks"] + spec.prior_exposures * rate
    others = table["_item_id_others"] + spec.prior_exposures * (1 - rate)
    return table.mutate(**{spec.name: (clicks / others).ln()})


def _timed(log: canonical.Log) -> ir.Table:
    """Selects the events that are known to be over at some time, with that time and whether it is their own."""
    events = log.events.mutate(moment_s=canonical.known_time_s(log.events))
    events = events.filter(events.moment_s > canonical.BEFORE_EVERYTHING_S)
    is_timed = ibis.ifelse(events.time_s.notnull(), 1.0, 0.0)
    return events.select("user_id", "item_id", "moment_s", num=ibis.literal(1.0), num_timed=is_timed)


def _with_attributes(table: ir.Table, log: canonical.Log) -> ir.Table:
    """Adds the counted attributes of items."""
    columns = [column for column in counted(log).values() if column != "item_id"]
    if not columns:
        return table
    items = log.items.select(_key="item_id", **{f"_of_{name}": log.items[name] for name in columns})
    joined = table.left_join(items, table.item_id == items["_key"])
    return joined.select(table, **{name: items[f"_of_{name}"] for name in columns})


def _earlier(events: ir.Table, asked: ir.Table, column: str, sums: dict[str, tuple[str, int]]) -> ir.Table:
    """Sums over the events before each moment that is asked for: `_value`, `_moment_s`, and what `sums` names.

    `sums`: name -> column of `events`, and the seconds that it goes back; 0: to the beginning.
    """
    zero, summed = ibis.literal(0.0), sorted({name for name, _ in sums.values()})
    numbers = {name: events[name] for name in summed}
    moments = events.select(_value=events[column], _moment_s=events.moment_s, **numbers).union(
        asked.select(_value=asked[column], _moment_s=asked["_asked_s"], **dict.fromkeys(summed, zero))
    )
    moments = moments.filter(moments["_value"].notnull())
    # Sums are float64, exact below 2^53: DuckDB sums int64 to HUGEINT, and Ibis would drop a cast back to int64.
    per_moment = moments.group_by(["_value", "_moment_s"]).agg(**{name: moments[name].sum() for name in summed})

    def count(name: str, window_s: int) -> ir.Value:
        # The frame ends a second before the moment itself.
        before = (-window_s if window_s else None, -1)
        frame = ibis.window(group_by="_value", order_by=per_moment["_moment_s"], range=before)
        return ibis.coalesce(per_moment[name].sum().over(frame), zero)

    return per_moment.select("_value", "_moment_s", **{name: count(*of) for name, of in sums.items()})


def _joined(table: ir.Table, earlier: ir.Table, column: str, moment: str) -> ir.Table:
    """Adds the counts of each candidate's value; 0 without a value."""
    names = [name for name in earlier.columns if name not in ("_value", "_moment_s")]
    found = table.left_join(earlier, [table[column] == earlier["_value"], table[moment] == earlier["_moment_s"]])
    return found.select(table, **{name: ibis.coalesce(earlier[name], ibis.literal(0.0)) for name in names})


def write(engine: Engine, log: canonical.Log, root: pathlib.Path) -> None:
    """Writes what serving counts by, with raw ids: events per item and second, attributes of items, labels per day.

    Nothing without features of candidates that count.
    """
    if not any(spec.counts for spec in log.features):
        return
    folder = root / FOLDER
    folder.mkdir()
    events = _timed(log)
    per_moment = events.group_by(["item_id", "moment_s"]).agg(
        num=events.num.sum().cast("int64"), num_timed=events.num_timed.sum().cast("int64")
    )
    latest = [int(table.execute() or 0) for table in _latest(log, events)]
    fields = [("item_id", pa.string()), *((name, pa.int64()) for name in ("moment_s", "num", "num_timed"))]
    about = pa.schema(fields, metadata={AS_OF: str(1 + max(latest)).encode()})
    _write(engine, per_moment.order_by(["item_id", "moment_s"]), folder / EVENTS, about)
    columns = {name: column for name, column in counted(log).items() if column != "item_id"}
    items = log.items.select("item_id", **{name: log.items[column] for name, column in columns.items()})
    about = pa.schema([(name, pa.string()) for name in ("item_id", *columns)])
    _write(engine, items.order_by("item_id"), folder / ITEMS, about)
    if any(spec.prior_exposures for spec in log.features):
        fields = [
            ("item_id", pa.string()),
            ("moment_s", pa.int64()),
            ("clicks", pa.float64()),
            ("others", pa.float64()),
        ]
        _write(engine, _by_day(log).order_by(["item_id", "moment_s"]), folder / DAYS, pa.schema(fields))


def _latest(log: canonical.Log, events: ir.Table) -> list[ir.Scalar]:
    """Gives the latest times of the log: of its events, and of its exposures."""
    return [events.moment_s.max(), *([] if log.exposures is None else [log.exposures.time_s.max()])]


def _write(engine: Engine, rows: ir.Table, path: pathlib.Path, about: pa.Schema) -> None:
    with pq.ParquetWriter(path, about, compression="zstd", write_page_checksum=True) as writer:
        for batch in engine.batches(rows, 1 << 17):
            if batch.num_rows:
                table = pa.Table.from_batches([batch]).select(about.names)
                writer.write_table(table.cast(about))
