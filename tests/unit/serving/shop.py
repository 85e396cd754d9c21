"""A hand-made artefact's parts: items with a vocabulary, a hashed author, a managed brand, a bag, two numbers."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist import features, schema
from gpsd_dist.serving.items import Items
from gpsd_dist.serving.requests import Limits, RequestReader
from gpsd_dist.serving.vocabulary import Vocabulary

BOTH = ("history", "candidate")
FEATURES = (
    schema.Feature("item", BOTH, table="item"),
    schema.Feature("author", BOTH, table="author"),
    schema.Feature("brand", BOTH, table="brand"),
    schema.Feature("tags", BOTH, table="tags", is_bag=True),
    schema.Feature("price", BOTH, "numerical", mean=1.0, std=2.0),
    schema.Feature("action", ("history",), table="action"),
    schema.Feature("position", ("candidate",), "numerical"),
    schema.Feature("tab", ("context",), table="tab"),
    schema.Feature("age", ("context",), "numerical"),
)
VOCABULARIES = {"item": ["a", "b", "7"], "tags": ["red", "blue"], "action": ["view", "buy"], "tab": ["home"]}


def ids(*texts: str | None) -> np.ndarray:
    return features.id_of(pa.array(texts, pa.string()))


def manifest(split_rule: str = "TimeBoundaries", max_history_length: int = 4, **options) -> schema.Manifest:
    sizes = {name: len(words) + 2 for name, words in VOCABULARIES.items()} | {"author": 102, "brand": 6}
    return schema.Manifest(
        source="generic",
        features=FEATURES,
        tables=tuple(schema.Table(name, size, name) for name, size in sizes.items()),
        tasks=(schema.Task("click"),),
        splits=(),
        max_history_length=max_history_length,
        options={"split_rule": split_rule} | options,
        unbounded={"author": "hashed", "brand": "managed"},
    )


def reader(folder: pathlib.Path, limits: Limits | None = None, **changes) -> RequestReader:
    """Writes and opens the parts. Items a, b, 7 are rows 2, 3, 4; brands X and Y have the rows 5 and 3."""
    vocabularies = {}
    for name, words in VOCABULARIES.items():
        Vocabulary.write(folder / f"{name}.safetensors", ids(*words), np.arange(2, 2 + len(words)))
    Vocabulary.write(folder / "brand.safetensors", ids("X", "Y"), np.array([5, 3]))
    for name in (*VOCABULARIES, "brand"):
        vocabularies[name] = Vocabulary.open(folder / f"{name}.safetensors", 2**31)
    items = pa.table(
        {
            "index": [2, 3, 4],
            "author": ids("anne", "bob", None),
            "brand": ids("X", "Z", "Y"),
            "tags": pa.array([[2, 3], [1], [3]], pa.list_(pa.int64())),
            "price": pa.array([3.0, 0.0, 5.0], pa.float32()),
        }
    )
    pq.write_table(items, folder / "items.parquet")
    described = manifest(**changes)
    Items.write(folder / "items.safetensors", folder / "items.parquet", described)
    return RequestReader(described, vocabularies, Items.open(folder / "items.safetensors"), limits or Limits())


def request(**changes) -> dict:
    """A request of two events and two candidates; keyword `history_item` changes the column `history.item`."""
    made = {
        "user_id": "u",
        "request_time_s": 100,
        "history.item": ["a", "b"],
        "history.time_s": [10, 20],
        "history.action": ["view", None],
        "candidate.item": ["b", "new"],
        "candidate.position": [0, 1.5],
        "context.tab": "home",
        "context.age": None,
    }
    for name, value in changes.items():
        column = name if name in ("user_id", "request_time_s") else name.replace("_", ".", 1)
        made[column] = value
    return {name: value for name, value in made.items() if value != "ABSENT"}
