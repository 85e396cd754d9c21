"""Reads Amazon 2014 5-core Grocery, with the fixed samples of the official GPSD protocol.

interactions.csv: user, item, cate, timestamp (days; file order is the order of events).
samples.csv: user, target, target_cate, negative, negative_cate, split ("train" or "eval"): one request per user, two
candidates.
"""

import pathlib

import ibis

from data_pipeline import canonical, raw_files
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions

INTERACTIONS = {"user": "string", "item": "string", "cate": "string", "timestamp": "int64"}
SAMPLES = {
    "user": "string",
    "target": "string",
    "target_cate": "string",
    "negative": "string",
    "negative_cate": "string",
    "split": "string",
}


def find_files(options: BuildOptions) -> dict[str, pathlib.Path]:
    """Finds interactions.csv and samples.csv."""
    raw_dir = raw_files.require_folder(options.raw_dir)
    return {
        "interactions": raw_files.require_file(raw_dir / "interactions.csv", "the interactions"),
        "samples": raw_files.require_file(raw_dir / "samples.csv", "the fixed (user, target, negative, split) samples"),
    }


def read(engine: Engine, files: dict[str, pathlib.Path], options: BuildOptions) -> canonical.Log:
    """Takes every interaction as an event, and the samples as exposures at the time of the user's last interaction."""
    interactions = engine.materialise(
        "interactions", raw_files.read_columns(engine, files["interactions"], INTERACTIONS)
    )
    raw_files.require_values(files["interactions"], interactions, tuple(INTERACTIONS))
    samples = engine.materialise("samples", raw_files.read_columns(engine, files["samples"], SAMPLES))
    raw_files.require_values(files["samples"], samples, tuple(SAMPLES))
    raw_files.require_one_of(files["samples"], samples, "split", ("train", "eval"))
    raw_files.require_unique(files["samples"], samples, "user")
    latest = ibis.window(group_by="user", order_by=[interactions.timestamp.desc(), interactions.file_order.desc()])
    last = interactions.mutate(place=ibis.row_number().over(latest)).filter(ibis._.place == 0)
    last = last.select(last_user=last.user, last_item=last["item"], last_s=last.timestamp)
    joined = samples.left_join(last, samples.user == last.last_user)
    wrong = joined.filter(joined.last_item.isnull() | (joined.last_item != joined.target))
    raw_files.require_none(
        files["samples"],
        wrong,
        "target",
        "the last item of that user in interactions.csv",
        "use the two files of one preparation",
    )
    candidates = [
        joined.select(
            user_id=joined.user,
            item_id=joined[column],
            time_s=joined.last_s,
            order=ibis.literal(place, type="int64"),
            click=ibis.literal(label, type="float64"),
            split=ibis.cases((joined.split == "eval", "test"), else_="train"),
        )
        for place, (column, label) in enumerate([("target", 1.0), ("negative", 0.0)])
    ]
    categories = [interactions.select(item_id=interactions["item"], category=interactions.cate)]
    categories += [
        samples.select(item_id=samples[side], category=samples[f"{side}_cate"]) for side in ("target", "negative")
    ]
    every = categories[0].union(*categories[1:])
    return canonical.Log(
        events=interactions.select(
            user_id=interactions.user,
            item_id=interactions["item"],
            time_s=interactions.timestamp,
            order=interactions.file_order,
        ),
        exposures=candidates[0].union(candidates[1]),
        items=every.group_by("item_id").agg(category=every.category.min()),
        features=(
            canonical.FeatureSpec("item", ("history", "candidate"), "item_id"),
            canonical.FeatureSpec("category", ("history", "candidate"), "items"),
        ),
        split=canonical.Given(valid_fraction=options.valid_fraction),
        order_words="by day, then by the order of the lines in interactions.csv",
    )
