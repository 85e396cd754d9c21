"""Reads any CSV, JSON-lines or Parquet log whose columns are named in a TOML file: what most users have.

    python -m data_pipeline.build --source generic --raw_dir RAW --schema RAW/schema.toml --out_dir OUT

    [history]                            # what users did; becomes histories and pretraining sequences
    files = "events/*.csv"               # relative to --raw_dir; read in order of name
    user = "uid"
    item = "sku"
    time = "ts"
    time_unit = "ms"                     # s (default), ms, us, iso
    event = "action"                     # with event_types: which rows count
    event_types = ["view", "buy"]
    feature = [{ column = "action" }]    # inputs that belong to the event

    [exposure]                           # what was shown and what came of it: candidates with labels
    files = "impressions.parquet"
    user = "uid"
    item = "sku"
    time = "ts"
    task = [{ column = "click" }, { column = "buy", given = "click" }]
    feature = [{ column = "slot", place = "candidate" }]

    [items]
    files = "items.jsonl"
    item = "sku"
    feature = [{ column = "category" }, { column = "tags", kind = "bag", separator = "|" }]

    [split]
    valid_from = 2024-05-01              # or valid_fraction = 0.1 and test_fraction = 0.1
    test_from = 2024-05-02

Every key: `data_pipeline/sources/log_description.py`; more examples: README.md beside it.
"""

import dataclasses
import datetime
import math
import pathlib
import zoneinfo

import ibis
import ibis.expr.types as ir
import pydantic.dataclasses

from data_pipeline import canonical, explain, progress, shares
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions, option
from data_pipeline.sources import described_files, log_description

TOKEN_PLACES = ("history", "candidate")
HISTORY_ACTION = "history"
"""Action of an event of [history], where exposures bring several actions and [history] names none."""
EXPOSURE_ORDER = described_files.ROWS  # an exposure that became an event comes after logged events of that moment


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=explain.STRICT)
class Options:
    """Holds the options of this source."""

    schema: pathlib.Path | None = option(None, "TOML file that names the columns; default schema.toml in --raw_dir")


def complete(options: BuildOptions) -> BuildOptions:
    """Takes the values of the TOML file's [options] and [split] where the command line is silent."""
    description = log_description.read(_schema_path(options))
    split = {name: getattr(description.split, name) for name in ("valid_fraction", "no_valid")}
    return options.with_defaults(dataclasses.asdict(description.options) | split)


def find_files(options: BuildOptions) -> dict[str, pathlib.Path]:
    """Finds the TOML file and every file that it names."""
    path = _schema_path(options)
    description = log_description.read(path)
    files = {"schema": path}
    for section in log_description.SECTIONS:
        part = getattr(description, section)
        if part is not None and part.files:
            files |= described_files.find(options.raw_dir, section, part.files)
    return files


def _schema_path(options: BuildOptions) -> pathlib.Path:
    if options.raw_dir is None:
        raise ValueError("--raw_dir is missing; it is the folder that the file patterns of the schema are relative to")
    return options.raw_dir / "schema.toml" if options.own.schema is None else options.own.schema


def read(engine: Engine, files: dict[str, pathlib.Path], options: BuildOptions) -> canonical.Log:
    """Makes the canonical tables of the described files."""
    description = log_description.read(files["schema"])
    reader = described_files.Reader(engine, files, description, options.reading)
    skipped: dict[str, int] = {}
    exposures = None if description.exposure is None else reader.exposures(skipped)
    events = _events(engine, reader, description, exposures, skipped)
    items = reader.items(skipped)
    users = None if description.users is None else reader.users(skipped)
    _check_joins(description, options.allow_empty, events, exposures, items, users)
    split, items = _split(description, options, exposures), _or_ids(engine, items, events, exposures)
    return canonical.Log(
        events=events,
        items=items,
        features=_features(description),
        split=split,
        order_words=_order_words(description),
        exposures=exposures,
        users=users,
        tasks=description.tasks(),
        skipped=skipped,
        reading=reader.reading(),
        sampling=tuple(description.sampling()),
    )


def _check_joins(
    description: log_description.LogDescription,
    is_allowed: bool,
    events: ir.Table,
    exposures: ir.Table | None,
    items: ir.Table | None,
    users: ir.Table | None,
) -> None:
    """Counts the ids of the logs that the other sections have. ValueError if it is none."""

    def check(key: str, logs: list[ir.Table], other: ir.Table, words: str) -> None:
        ids = [log.select(key) for log in logs]
        every = (ids[0].union(*ids[1:]) if len(ids) > 1 else ids[0]).distinct()
        others = other.select(key).distinct()
        joined, num_others = int(every.semi_join(others, key).count().execute()), int(others.count().execute())
        shares.check_join(words, joined, int(every.count().execute()), is_allowed)
        progress.say(f"  {num_others - joined:,} of the {num_others:,} in {words.split()[-1]} occur nowhere else")

    logs = [events] if exposures is None else [events, exposures]
    if items is not None and description.items.files:
        check("item_id", logs, items, "items of the log are in [items]")
    if users is not None:
        check("user_id", logs, users, "users of the log are in [users]")
    if exposures is not None and description.history is not None:
        check("user_id", [exposures], events, "users of [exposure] are in [history]")


def _events(
    engine: Engine,
    reader: described_files.Reader,
    description: log_description.LogDescription,
    exposures: ir.Table | None,
    skipped: dict[str, int],
) -> ir.Table:
    """Joins the history log and the exposures that extend it."""
    events = None if description.history is None else reader.events(skipped)
    tasks = () if exposures is None else description.exposure.extends_history
    if not tasks:
        return events
    action, features = description.exposure.history_action, description.history.feature if description.history else ()
    if events is not None and action and action not in events.columns:
        events = events.mutate(**{action: ibis.literal(HISTORY_ACTION)})
    parts = [] if events is None else [events]
    for place, task in enumerate(tasks, 1):
        clicked = exposures.filter(exposures[task] == 1)
        columns = {"user_id": clicked.user_id, "item_id": clicked.item_id, "time_s": clicked.time_s}
        columns["order"] = clicked.order + place * EXPOSURE_ORDER
        for feature in features:  # the exposure log has no such column
            columns[feature.label] = ibis.null("float64" if feature.kind == "numerical" else "string")
        if action:
            columns[action] = ibis.literal(task)
        clicked = clicked.select(**columns)
        parts.append(clicked if events is None else _not_in_history(clicked, events, action, skipped))
    columns = parts[0].columns
    if len(parts) == 1:
        return parts[0]
    return engine.materialise("history_and_clicks", ibis.union(*[part.select(*columns) for part in parts]))


def _not_in_history(clicked: ir.Table, events: ir.Table, action: str, skipped: dict[str, int]) -> ir.Table:
    """Leaves out clicks that [history] has too: the same user, item and second, and action if there are several."""
    keys = ["user_id", "item_id", "time_s", *[action] * bool(action)]
    others = clicked.anti_join(events.select(keys).distinct(), keys)
    num_both = int(clicked.count().execute()) - int(others.count().execute())
    if num_both:
        reason = "exposures that extend the history and are in [history] already (they count once)"
        skipped[reason] = skipped.get(reason, 0) + num_both
    return others


def _or_ids(engine: Engine, items: ir.Table | None, events: ir.Table, exposures: ir.Table | None) -> ir.Table:
    """Returns `items`, or the bare ids of the logs where nothing is known about them."""
    if items is not None:
        return items
    ids = events.select("item_id")
    if exposures is not None:
        ids = ids.union(exposures.select("item_id"))
    return engine.materialise("item_ids", ids.distinct())


def _features(description: log_description.LogDescription) -> tuple[canonical.FeatureSpec, ...]:
    specs = [canonical.FeatureSpec("item", TOKEN_PLACES, "item_id")]
    for section, origin, places in (
        ("items", "items", TOKEN_PLACES),
        ("history", "log", ("history",)),
        ("exposure", "log", None),
        ("users", "users", ("context",)),
    ):
        part = getattr(description, section)
        for feature in () if part is None else part.feature:
            kind = "numerical" if feature.kind == "numerical" else "categorical"
            is_bag = feature.kind == "bag"
            where = places or (feature.place,)
            specs.append(canonical.FeatureSpec(feature.label, where, origin, kind, is_bag=is_bag, log=feature.log))
    action = "" if description.exposure is None else description.exposure.history_action
    if action and action not in [spec.name for spec in specs]:
        specs.append(canonical.FeatureSpec(action, ("history",), "log"))
    return tuple(specs)


def _split(
    description: log_description.LogDescription, options: BuildOptions, exposures: ir.Table | None
) -> canonical.SplitRule:
    rule = description.split
    if exposures is None:
        if rule.rule == "leave_last_out":
            return canonical.LeaveLastOut()
        return canonical.LastItemByTime(train_quantile=1 - rule.test_fraction, valid_fraction=options.valid_fraction)
    if rule.valid_from:
        until_s = _epoch_s(rule.test_until, rule.time_zone) if rule.test_until else None
        words = f"valid from {rule.valid_from}, test from {rule.test_from}"
        words += f" until {rule.test_until}" if rule.test_until else ""
        bounds = _epoch_s(rule.valid_from, rule.time_zone), _epoch_s(rule.test_from, rule.time_zone)
    else:
        until_s = None
        words = f"latest {rule.test_fraction} of the exposures test, {options.valid_fraction} before them valid"
        bounds = (
            _time_at(exposures, 1 - rule.test_fraction - options.valid_fraction),
            _time_at(exposures, 1 - rule.test_fraction),
        )
    if not rule.valid_from and not bounds[0] < bounds[1]:
        raise ValueError(
            f"[split]: {int(exposures.count().execute()):,} exposures are too few, or too many are of one second, to "
            f"cut off the {words}; bring a longer log, or state `valid_from` and `test_from` in [split]"
        )
    if not bounds[0] < bounds[1] or (until_s is not None and until_s <= bounds[1]):
        shown = [_in_words(bound, rule.time_zone) for bound in (*bounds, until_s) if bound is not None]
        raise ValueError(f"[split]: the boundaries {words} do not ascend ({', '.join(shown)}); correct them")
    earliest, latest = (
        int(value) for value in exposures.agg(low=exposures.time_s.min(), high=exposures.time_s.max()).execute().iloc[0]
    )
    empty = ["train"] * (not earliest < bounds[0]) + ["test"] * (not latest >= bounds[1])
    if empty:
        raise ValueError(
            f"[split]: the exposures run from {_in_words(earliest, rule.time_zone)} to "
            f"{_in_words(latest, rule.time_zone)}, so that {' and '.join(empty)} is empty with valid from "
            f"{_in_words(bounds[0], rule.time_zone)} and test from {_in_words(bounds[1], rule.time_zone)}; choose both "
            "dates inside of that period (or leave them out: the latest 10 % are test then), or correct "
            "exposure.time_unit"
        )
    words = f"{words}, time zone {rule.time_zone}: {bounds} (epoch s)"
    return canonical.TimeBoundaries(valid_from_s=bounds[0], test_from_s=bounds[1], test_until_s=until_s, words=words)


def _epoch_s(text: str, time_zone: str) -> int:
    """Converts a checked date or ISO time to epoch seconds."""
    moment = datetime.datetime.fromisoformat(text)
    return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=zoneinfo.ZoneInfo(time_zone))).timestamp())


def _in_words(epoch_s: int, time_zone: str) -> str:
    """Writes a time as a user does, in the zone of the schema."""
    return datetime.datetime.fromtimestamp(epoch_s, zoneinfo.ZoneInfo(time_zone)).isoformat()


def _time_at(exposures: ir.Table, fraction: float) -> int:
    """Finds the time of the exposure at that part of the log."""
    place = min(int(fraction * exposures.count().execute()), int(exposures.count().execute()) - 1)
    return int(exposures.order_by("time_s").limit(1, offset=place).time_s.execute().iloc[0])


def _order_words(description: log_description.LogDescription) -> str:
    words = "by time, then by file name and the place of the row in the file"
    if description.exposure is not None and description.exposure.extends_history:
        tasks = ", then with ".join(f"{task} = 1" for task in description.exposure.extends_history)
        words += f"; exposures with {tasks} come after other events of the same second"
    return words
