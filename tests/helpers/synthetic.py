"""A tiny prepared data set (manifest, Parquet files of all splits, vocabularies) with every kind of feature.

Users prefer one category: their histories come from it, and its candidates are clicked more often, so that a model
can learn something from 200 rows.
"""

import dataclasses
import itertools
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist import schema

TABLE_ROWS = {"item": 200, "category": 12, "tag": 40, "behaviour": 6, "tab": 5, "segment": 9}
BOTH = ("history", "candidate")
FEATURES = (
    schema.Feature("item", BOTH, table="item"),
    schema.Feature("category", BOTH, table="category"),
    schema.Feature("tags", BOTH, table="tag", is_bag=True),
    schema.Feature("price", BOTH, kind="numerical"),
    schema.Feature("behaviour", ("history",), table="behaviour"),
    schema.Feature("tab", ("candidate",), table="tab"),
    schema.Feature("discount", ("candidate",), kind="numerical"),
    schema.Feature("segment", ("context",), table="segment"),
    schema.Feature("interests", ("context",), table="tag", is_bag=True),
    schema.Feature("age", ("context",), kind="numerical"),
)
TASKS = (schema.Task("click"), schema.Task("buy", given="click"))
SPLITS = ("pretrain", "train", "valid", "test")
_DAY_S = 86_400
_START_S = {"pretrain": 0, "train": 1_600_000_000, "valid": 1_600_000_000 + _DAY_S, "test": 1_600_000_000 + 2 * _DAY_S}


def make_manifest(*, table_rows: dict[str, int] | None = None, max_history_length: int = 30) -> schema.Manifest:
    """The manifest without splits."""
    rows = TABLE_ROWS | (table_rows or {})
    return schema.Manifest(
        source="synthetic test data",
        features=FEATURES,
        tables=tuple(schema.Table(name, rows[name], fingerprint=f"{name}-{rows[name]}") for name in TABLE_ROWS),
        tasks=TASKS,
        splits=(),
        max_history_length=max_history_length,
        split_rule="by day",
    )


def make_rows(
    manifest: schema.Manifest,
    split: str,
    *,
    seed: int,
    num_rows: int,
    max_candidates: int = 4,
    first_user: int = 0,
) -> pa.Table:
    """Rows of one split with random contents. About every eighth history is empty."""
    random = np.random.default_rng((seed, SPLITS.index(split)))
    known = {table.name: table.num_rows - schema.NUM_RESERVED_ROWS for table in manifest.tables}
    columns: dict[str, list] = {field.name: [] for field in schema.arrow_schema(manifest, split)}
    for row in range(num_rows):
        preferred = int(random.integers(known["category"]))
        length = 0 if random.random() < 1 / 8 else int(random.integers(1, manifest.max_history_length + 1))
        count = int(random.integers(1, max_candidates + 1))
        request_time_s = _START_S[split] + int(random.integers(_DAY_S))
        items = {
            "history": _items(random, known, length, preferred, 0.8),
            "candidate": _items(random, known, count, preferred, 0.4),
        }
        is_preferred = (items["candidate"] - 2) % known["category"] == preferred
        click = (random.random(count) < np.where(is_preferred, 0.85, 0.15)).astype(float).tolist()
        click = [None if random.random() < 0.05 else value for value in click]
        buy = [float(random.random() < 0.4) if value == 1 else random.choice([0.0, None]) for value in click]
        values = {
            "user_id": f"user-{first_user + row}",
            "user_hash": (first_user + row) * 7919 % 10_007,
            "history_length": length,
            "history.time_s": [None if i == 0 else request_time_s - 60 * (length - i) for i in range(length)],
            "request_time_s": request_time_s,
            "label.click": click,
            "label.buy": buy,
            "context.segment": int(1 + random.integers(manifest.table("segment").num_rows - 1)),
            "context.interests": _bag(random, known),
            "context.age": float(np.float32(random.normal())),
            "history.behaviour": (1 + random.integers(known["behaviour"] + 1, size=length)).tolist(),
            "candidate.tab": (1 + random.integers(known["tab"] + 1, size=count)).tolist(),
            "candidate.discount": random.normal(size=count).astype(np.float32).tolist(),
        }
        for place, item in items.items():
            values[f"{place}.item"] = item.tolist()
            values[f"{place}.category"] = np.where(item == 1, 1, 2 + (item - 2) % known["category"]).tolist()
            values[f"{place}.tags"] = [_bag(random, known) for _ in item]
            values[f"{place}.price"] = random.normal(size=len(item)).astype(np.float32).tolist()
        for name, column in columns.items():
            column.append(values[name])
    return pa.table(columns, schema=schema.arrow_schema(manifest, split))


def write_dataset(
    path: str | pathlib.Path,
    *,
    seed: int,
    num_rows: dict[str, int] | int = 200,
    num_files: int = 2,
    row_group_rows: int = 32,
    table_rows: dict[str, int] | None = None,
    max_history_length: int = 30,
    max_candidates: int = 4,
) -> schema.Manifest:
    """Writes all splits to `path` and returns the manifest. `num_rows`: of each split, or split -> rows."""
    path = pathlib.Path(path)
    manifest = make_manifest(table_rows=table_rows, max_history_length=max_history_length)
    splits, first_user = [], 0
    for split in SPLITS:
        split_rows = num_rows[split] if isinstance(num_rows, dict) else num_rows
        table = make_rows(
            manifest, split, seed=seed, num_rows=split_rows, max_candidates=max_candidates, first_user=first_user
        )
        first_user += split_rows if split != "pretrain" else 0
        splits.append(write_split(path, split, table, num_files=num_files, row_group_rows=row_group_rows))
    manifest = dataclasses.replace(manifest, splits=tuple(splits))
    _write_vocabularies(path, manifest)
    schema.write_manifest(manifest, path)
    return manifest


def write_split(
    path: pathlib.Path, split: str, table: pa.Table, *, num_files: int = 1, row_group_rows: int = 32
) -> schema.Split:
    """Writes the rows of one split as given, right or wrong, and returns its entry in the manifest."""
    (path / split).mkdir(parents=True, exist_ok=True)
    files, cuts = [], np.linspace(0, len(table), num_files + 1).astype(int)
    for index, (start, stop) in enumerate(itertools.pairwise(cuts)):
        files.append(f"{split}/part-{index:05d}.parquet")
        options = {"row_group_size": row_group_rows, "write_page_checksum": True}
        pq.write_table(table.slice(start, stop - start), path / files[-1], **options)
    has_candidates = "label.click" in table.column_names
    times = table["request_time_s"].to_pylist() if has_candidates else []
    return schema.Split(
        name=split,
        files=tuple(files),
        num_rows=len(table),
        num_history_tokens=sum(table["history_length"].to_pylist()),
        num_candidates=sum(map(len, table["label.click"].to_pylist())) if has_candidates else 0,
        time_from_s=min(times, default=None),
        time_to_s=max(times, default=None),
    )


def _items(random, known, count, preferred, probability):
    """Indices whose category (index - 2) % categories is often the preferred one; a few are unknown (1)."""
    category = np.where(random.random(count) < probability, preferred, random.integers(known["category"], size=count))
    per_category = known["item"] // known["category"]
    index = 2 + category + known["category"] * random.integers(per_category, size=count)
    return np.where(random.random(count) < 0.03, 1, index)


def _bag(random, known):
    return (1 + random.choice(known["tag"] + 1, size=random.integers(0, 4), replace=False)).tolist()


def _write_vocabularies(path: pathlib.Path, manifest: schema.Manifest) -> None:
    (path / "vocab").mkdir(parents=True, exist_ok=True)
    for table in manifest.tables:
        index = np.arange(schema.NUM_RESERVED_ROWS, table.num_rows)
        columns = {
            "raw_id": [f"{table.name}-{i}" for i in index],
            "index": index,
            "count": np.ones(len(index), np.int64),
        }
        pq.write_table(pa.table(columns), path / "vocab" / f"{table.name}.parquet")
    index = np.arange(schema.NUM_RESERVED_ROWS, manifest.table("item").num_rows)
    known_categories = manifest.table("category").num_rows - schema.NUM_RESERVED_ROWS
    pq.write_table(pa.table({"index": index, "category": 2 + (index - 2) % known_categories}), path / "items.parquet")
