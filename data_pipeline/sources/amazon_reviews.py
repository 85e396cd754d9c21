"""Reads Amazon product reviews, releases 2014 and 2018: JSON lines of reviews and of product metadata, also gzipped.

Reviews: reviewerID, asin, unixReviewTime. Metadata: asin, brand, and the category as `categories` (2014: list of
paths; also a plain list) or `category` (2018: one path); the category of an item is the last name of the last path.
Lines are parsed as JSON. A line that is not JSON (the "loose" metadata of 2014 hold Python dict literals) goes
through `ast.literal_eval`, which evaluates constants only, up to a length limit; one that is neither is counted under
"skipped", and more than 1 % of such lines is an error. Split as in GPSD: one request per user, target = last review.
"""

import pathlib

import ibis
import ibis.expr.types as ir
import pydantic.dataclasses

from data_pipeline import canonical, explain, raw_files
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions, option
from data_pipeline.sources import json_lines

REVIEWS = {"reviewerID": "string", "asin": "string", "unixReviewTime": "int64"}
META = {"asin": "string", "brand": "string", "categories": "array<string>", "category": "array<string>"}
META_PREFIX = "meta"
FILE_STRIDE = 1 << 40  # rows per file: `order` = file number * stride + place in the file


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=explain.STRICT)
class Options:
    """Holds the options of this source."""

    train_quantile: float = option(0.7, "part of the users, by last time, that train")
    all_categories: bool = option(False, "also a bag of all category names of an item")
    no_meta: bool = option(False, "build without item attributes, where there is no meta file")


def find_files(options: BuildOptions) -> dict[str, pathlib.Path]:
    """Finds the JSON-lines files of the folder: names that begin with "meta" are metadata, all others reviews."""
    raw_dir = options.raw_dir
    if raw_dir is None or not raw_dir.is_dir():
        raise ValueError(
            f"--raw_dir {raw_dir} is not a folder; it holds the files of reviews and metadata (.json or .json.gz)"
        )
    paths = sorted(path for path in raw_dir.iterdir() if path.is_file() and json_lines.is_json_lines(path))
    metas = [path for path in paths if path.name.lower().startswith(META_PREFIX)]
    reviews = [path for path in paths if path not in metas]
    if not reviews:
        raise ValueError(
            f"{raw_dir} holds no file of reviews (.json, .jsonl, .json.gz); fetch one, e.g. reviews_Books_5.json.gz"
        )
    if not metas and not options.own.no_meta:
        raise ValueError(f"{raw_dir} holds no meta*.json file (categories, brand); fetch it, or build with --no_meta")
    named = {f"reviews/{path.name}": path for path in reviews}
    named |= {} if options.own.no_meta else {f"meta/{path.name}": path for path in metas}
    return {name: raw_files.require_file(path, "JSON lines") for name, path in named.items()}


def read(engine: Engine, files: dict[str, pathlib.Path], options: BuildOptions) -> canonical.Log:
    """Takes every review as an event."""
    skipped: dict[str, int] = {}
    events = _events(engine, [path for name, path in files.items() if name.startswith("reviews/")], skipped)
    metas = [path for name, path in files.items() if name.startswith("meta/")]
    names = [] if not metas else ["category", "brand"] + (["categories"] if options.own.all_categories else [])
    items = (
        _items(engine, metas, skipped) if metas else engine.materialise("items", events.select("item_id").distinct())
    )
    specs = [canonical.FeatureSpec("item", ("history", "candidate"), "item_id")]
    specs += [
        canonical.FeatureSpec(name, ("history", "candidate"), "items", is_bag=name == "categories") for name in names
    ]
    return canonical.Log(
        events=events,
        items=items,
        features=tuple(specs),
        split=canonical.LastItemByTime(
            train_quantile=options.own.train_quantile, valid_fraction=options.valid_fraction
        ),
        order_words="by time (days), then by file name and the order of the lines",
        skipped={reason: count for reason, count in skipped.items() if count},
    )


def _events(engine: Engine, paths: list[pathlib.Path], skipped: dict[str, int]) -> ir.Table:
    """Keeps complete and distinct reviews."""
    rows = engine.materialise("reviews", _read_all(engine, paths, REVIEWS, "review", skipped))
    complete = rows.filter(rows.reviewerID.notnull() & rows.asin.notnull() & rows.unixReviewTime.notnull())
    grouped = complete.group_by(user_id=complete.reviewerID, item_id=complete.asin, time_s=complete.unixReviewTime)
    events = engine.materialise("distinct_reviews", grouped.agg(order=complete.order.min()))
    num_complete = int(complete.count().execute())
    skipped["reviews without reviewerID, asin or unixReviewTime"] = int(rows.count().execute()) - num_complete
    skipped["repeated reviews (same reviewer, product and time)"] = num_complete - int(events.count().execute())
    return events


def _items(engine: Engine, paths: list[pathlib.Path], skipped: dict[str, int]) -> ir.Table:
    """Reads item_id, category, brand and categories; the first line of a product counts."""
    rows = engine.materialise(
        "meta", _read_all(engine, paths, META, "meta", skipped).filter(lambda t: t.asin.notnull())
    )
    first = rows.mutate(place=ibis.row_number().over(ibis.window(group_by="asin", order_by="order"))).filter(
        lambda t: t.place == 0
    )
    path = ibis.ifelse(first.categories.length().fill_null(0) > 0, first.categories, first.category)
    items = first.select(
        item_id=first.asin,
        category=ibis.ifelse(path.length() > 0, path[path.length() - 1], ibis.null("string")),
        brand=first.brand,
        categories=path.unique().sort(),
    )
    stored = engine.materialise("items", items)
    skipped["repeated meta lines of a product"] = int(rows.count().execute()) - int(stored.count().execute())
    return stored


def _read_all(
    engine: Engine, paths: list[pathlib.Path], columns: dict[str, str], kind: str, skipped: dict[str, int]
) -> ir.Table:
    """Reads all files one after the other, with `order` over all of them."""
    optional = tuple(name for name in columns if name in ("brand", "categories", "category"))
    tables = []
    for number, path in enumerate(paths):
        table, num_bad = json_lines.read_columns(engine, path, columns, is_loose=True, optional=optional)
        reason = f"{kind} lines that are neither JSON nor a Python literal"
        skipped[reason] = skipped.get(reason, 0) + num_bad
        order = (table[raw_files.FILE_ORDER] + ibis.literal(number * FILE_STRIDE, type="int64")).cast("int64")
        tables.append(table.mutate(order=order).select("order", *columns))
    return tables[0].union(*tables[1:]) if len(tables) > 1 else tables[0]
