"""Reads Taobao UserBehavior.csv: user, item, category, behaviour (pv, cart, fav, buy), epoch s; no header; 100 M rows.

The protocol of GPSD (arXiv:2506.03699): one request per user whose target is the last event, one drawn negative, and
a history of at most 200 events. Rows outside the nine days of the data set (2017-11-25 to 2017-12-03, UTC+8) and
repeated rows are left out and counted. DuckDB works on disk beyond --memory_limit.
"""

import pathlib

import ibis
import ibis.expr.types as ir
import pydantic.dataclasses

from data_pipeline import canonical, explain, raw_files
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions, option

COLUMNS = {"user": "string", "item": "string", "category": "string", "behaviour": "string", "time": "int64"}
BEHAVIOURS = ("pv", "cart", "fav", "buy")
FIRST_S = 1_511_539_200  # 2017-11-25 00:00 UTC+8
END_S = FIRST_S + 9 * 86_400  # 2017-12-04 00:00 UTC+8
NAMES = ("UserBehavior.csv", "UserBehavior.csv.gz")


DEFAULTS = {"max_history_length": 200}  # replaces that of all sources


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=explain.STRICT)
class Options:
    """Holds the options of this source."""

    behaviours: str = option(",".join(BEHAVIOURS), "kinds that count, separated by commas")
    train_quantile: float = option(0.7, "part of the users, by last time, that train")


def find_files(options: BuildOptions) -> dict[str, pathlib.Path]:
    """Finds UserBehavior.csv, plain or compressed by gzip."""
    if options.raw_dir is None:
        raise ValueError(f"--raw_dir is missing; it is the folder that holds {NAMES[0]}")
    chosen = options.own.behaviours.split(",")
    if not set(chosen) <= set(BEHAVIOURS):
        raise ValueError(f"--behaviours {options.own.behaviours!r}: expected some of {','.join(BEHAVIOURS)}")
    path = next(
        (options.raw_dir / name for name in NAMES if (options.raw_dir / name).is_file()), options.raw_dir / NAMES[0]
    )
    return {"behaviours": raw_files.require_file(path, "user, item, category, behaviour, time without a header")}


def read(engine: Engine, files: dict[str, pathlib.Path], options: BuildOptions) -> canonical.Log:
    """Takes every row of a chosen kind inside the nine days as an event."""
    path = files["behaviours"]
    rows = raw_files.read_columns(engine, path, COLUMNS, style=raw_files.TextStyle(columns=tuple(COLUMNS)))
    raw_files.require_values(path, rows, tuple(COLUMNS))
    raw_files.require_one_of(path, rows, "behaviour", BEHAVIOURS)
    chosen = rows.behaviour.isin(options.own.behaviours.split(","))
    inside = (rows.time >= FIRST_S) & (rows.time < END_S)
    counts = (
        rows.agg(other=(~chosen).sum(), outside=(chosen & ~inside).sum(), used=(chosen & inside).sum())
        .execute()
        .iloc[0]
    )
    if not int(counts["used"]):
        raise ValueError(
            f"{path}: no row lies in 2017-11-25 .. 2017-12-03 (epoch s {FIRST_S} .. {END_S}); is it that data set?"
        )
    events = _distinct(engine, rows.filter(chosen & inside))
    skipped = {
        "behaviours that were not chosen": int(counts["other"]),
        "rows outside 2017-11-25 .. 2017-12-03 (UTC+8)": int(counts["outside"]),
        "repeated rows": int(counts["used"]) - int(events.count().execute()),
    }
    return canonical.Log(
        events=events.select("user_id", "item_id", "time_s", "order", "behaviour"),
        items=events.group_by("item_id").agg(category=events.category.min()),
        features=(
            canonical.FeatureSpec("item", ("history", "candidate"), "item_id"),
            canonical.FeatureSpec("category", ("history", "candidate"), "items"),
            canonical.FeatureSpec("behaviour", ("history",), "log"),
        ),
        split=canonical.LastItemByTime(
            train_quantile=options.own.train_quantile, valid_fraction=options.valid_fraction
        ),
        order_words="by second, then by the order of the lines in UserBehavior.csv",
        skipped={reason: count for reason, count in skipped.items() if count},
    )


def _distinct(engine: Engine, rows: ir.Table) -> ir.Table:
    """Keeps one event for equal rows, at the place of the first; an item with several categories gets the smallest."""
    keys = {"user_id": rows.user, "item_id": rows["item"], "behaviour": rows.behaviour, "time_s": rows.time}
    first = rows.group_by(**keys).agg(category=rows.category.min(), order=rows[raw_files.FILE_ORDER].min())
    return engine.materialise("behaviours", first.mutate(order=ibis._.order.cast("int64")))
