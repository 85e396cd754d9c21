"""Makes the rows that a benchmark trains on: prepared data cut to columns both sides read, or synthetic rows.

Both sides read the same Parquet files with two token features (item, and one small attribute called `category`) and
one task. Where the prepared data is not there, rows with the same distribution of history lengths take its place.
"""

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist.data import data_versions
from gpsd_dist.schema import Feature, Manifest, Split, Table, Task, arrow_schema, read_manifest, write_manifest

CANDIDATES_PER_ROW = {"pretrain": 0, "discriminative": 1, "discriminative_k2": 2}
_ROW_GROUP_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Source:
    """Describes the source of one data name's rows."""

    max_history_length: int
    batch_rows: int  # requests per step: 512, or 256 where histories reach 200 tokens (official settings)
    prepared: str | None  # folder under `data/`
    category: str  # which feature of the prepared data plays the category
    draw_lengths: typing.Callable[[np.random.Generator, int], np.ndarray]  # stand-in history lengths
    num_items: int
    num_rows: int = 8192


@dataclasses.dataclass(frozen=True)
class Geometric:
    """Draws history lengths clipped at `longest`; `mean` is that before clipping."""

    mean: float
    longest: int

    def __call__(self, random: np.random.Generator, count: int) -> np.ndarray:
        return np.minimum(random.geometric(1 / self.mean, count), self.longest)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Makes all histories equally long."""

    length: int

    def __call__(self, random: np.random.Generator, count: int) -> np.ndarray:
        return np.full(count, self.length)


SOURCES = {
    "grocery": Source(50, 512, "grocery", "category", Geometric(9, 50), 8_713),
    "kuairand": Source(50, 512, "kuairand", "duration_bucket", Geometric(55, 50), 7_483),
    "taobao_like": Source(200, 256, None, "", Geometric(62.4, 200), 100_000),  # mean 60 after clipping
}


@dataclasses.dataclass(frozen=True)
class BenchData:
    """Holds a data folder of one split that fulfils the Parquet contract."""

    data_dir: pathlib.Path
    manifest: Manifest
    split: str
    source: Source
    note: str  # what the rows are, for the report


@contextlib.contextmanager
def without_validation() -> typing.Iterator[None]:
    """Build a `Trainer` on these rows in it: it does not warn that none of them is `valid`, which is meant; of all else
    it does.
    """
    logger = logging.getLogger("gpsd_dist.assembly")
    logger.addFilter(_is_not_about_valid)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_about_valid)


def _is_not_about_valid(record: logging.LogRecord) -> bool:
    return "has no valid rows" not in record.msg


def prepare_synthetic(kind: str, name: str, source: Source, per_row: int, out_dir: pathlib.Path) -> BenchData:
    """Writes synthetic rows with `per_row` candidates each, whatever `kind` says; `name` is that of their folder."""
    split = "train" if CANDIDATES_PER_ROW[kind] else "pretrain"
    rows = _synthetic(source, split, per_row)
    num_rows, data_dir = {"item": source.num_items + 2, "category": 502}, out_dir / name
    return BenchData(data_dir, _write(rows, data_dir, split, num_rows, source), split, source, f"synthetic rows {name}")


def prepare(kind: str, data: str, data_root: pathlib.Path, out_dir: pathlib.Path) -> BenchData:
    """Writes the rows of benchmark `kind` on `data` below `out_dir`."""
    source, split = SOURCES[data], "train" if CANDIDATES_PER_ROW[kind] else "pretrain"
    prepared = None if source.prepared is None else data_root / source.prepared
    if prepared is not None and (data_versions.current(prepared) / "manifest.json").is_file():
        prepared = data_versions.current(prepared)
        rows, num_rows = _read_prepared(prepared, split, source.category)
        note = f"prepared data {data}"
    else:
        rows, num_rows = _synthetic(source, split), {"item": source.num_items + 2, "category": 502}
        missing = "" if prepared is None else f" ({prepared} is not there)"
        note = f"synthetic rows with the history lengths of {data}{missing}"
    if CANDIDATES_PER_ROW[kind]:
        rows = with_candidates(rows, CANDIDATES_PER_ROW[kind])
    data_dir = out_dir / f"{kind}-{data}"
    return BenchData(data_dir, _write(rows, data_dir, split, num_rows, source), split, source, note)


def with_candidates(rows: pa.Table, per_row: int) -> pa.Table:
    """Cuts every request's candidates into rows of exactly `per_row`; fewer at the end of a request are left out."""
    offsets = rows["candidate.item"].combine_chunks().offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    pieces = np.diff(offsets) // per_row
    row = np.repeat(np.arange(rows.num_rows), pieces)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    entry = (offsets[row] + nth * per_row)[:, None] + np.arange(per_row)
    cut = rows.take(pa.array(row))
    list_offsets = pa.array(np.arange(len(row) + 1, dtype=np.int32) * per_row)
    for name in rows.column_names:
        if name.startswith(("candidate.", "label.")):
            values = rows[name].combine_chunks().flatten().take(pa.array(entry.reshape(-1)))
            cut = cut.set_column(cut.schema.get_field_index(name), name, pa.ListArray.from_arrays(list_offsets, values))
    return cut


def _read_prepared(folder: pathlib.Path, split: str, category: str) -> tuple[pa.Table, dict[str, int]]:
    """Reads the columns of the two token features under the names item and category, and the rows of their tables."""
    manifest = read_manifest(folder)
    places = ("history", "candidate") if split == "train" else ("history",)
    names = {"user_id": "user_id", "user_hash": "user_hash", "history_length": "history_length"}
    for place in places:
        names |= {f"{place}.{manifest.item_feature}": f"{place}.item", f"{place}.{category}": f"{place}.category"}
    names["history.time_s"] = "history.time_s"
    if split == "train":
        task = manifest.tasks[0].name
        names |= {"request_time_s": "request_time_s", f"label.{task}": "label.click"}
    files = [folder / file for file in manifest.split(split).files]
    rows = pa.concat_tables([pq.read_table(file, columns=list(names)) for file in files]).rename_columns(names)
    features = {"item": manifest.item_feature, "category": category}
    return rows, {name: manifest.table(manifest.feature(old).table).num_rows for name, old in features.items()}


def _synthetic(source: Source, split: str, per_row: int = 2) -> pa.Table:
    """Draws items by Zipf's law; `per_row` candidates per request, the first one clicked."""
    random = np.random.default_rng(0)
    lengths = source.draw_lengths(random, source.num_rows)

    def lists(counts: np.ndarray) -> dict[str, pa.Array]:
        item = 2 + (random.zipf(1.2, counts.sum()) - 1) % source.num_items
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        values = {"item": item, "category": 2 + item % 500, "time_s": np.full(len(item), 1_600_000_000)}
        return {
            name: pa.ListArray.from_arrays(offsets, pa.array(value.astype(np.int64))) for name, value in values.items()
        }

    columns = {
        "user_id": pa.array([f"user-{row}" for row in range(source.num_rows)]),
        "user_hash": pa.array(np.arange(source.num_rows)),
        "history_length": pa.array(lengths.astype(np.int32)),
    }
    columns |= {f"history.{name}": column for name, column in lists(lengths).items()}
    if split == "train":
        candidate = lists(np.full(source.num_rows, per_row))
        columns |= {f"candidate.{name}": candidate[name] for name in ("item", "category")}
        columns["request_time_s"] = pa.array(np.full(source.num_rows, 1_600_000_001))
        offsets = pa.array(np.arange(source.num_rows + 1, dtype=np.int32) * per_row)
        label = np.tile(np.arange(per_row) == 0, source.num_rows).astype(np.float32)
        columns["label.click"] = pa.ListArray.from_arrays(offsets, pa.array(label))
    return pa.table(columns)


def _write(rows: pa.Table, data_dir: pathlib.Path, split: str, num_rows: dict[str, int], source: Source) -> Manifest:
    (data_dir / split).mkdir(parents=True, exist_ok=True)
    file = f"{split}/part-00000.parquet"
    num_candidates = pc.sum(pc.list_value_length(rows["candidate.item"])).as_py() if split == "train" else 0
    num_tokens = pc.sum(rows["history_length"]).as_py()
    places = ("history", "candidate")
    manifest = Manifest(
        source="benchmark",
        features=tuple(Feature(name, places, table=name) for name in ("item", "category")),
        tables=tuple(
            Table(name, count, hashlib.sha256(f"{name} {count}".encode()).hexdigest()[:32])
            for name, count in num_rows.items()
        ),
        tasks=(Task("click"),),
        splits=(
            Split(split, (file,), rows.num_rows, num_tokens, num_candidates, None, None),
            Split("valid", (), 0, 0, 0, None, None),  # nothing is validated under the clock
        ),
        max_history_length=source.max_history_length,
    )
    schema = arrow_schema(manifest, split)
    pq.write_table(
        rows.select(schema.names).cast(schema), data_dir / file, compression="zstd", row_group_size=_ROW_GROUP_ROWS
    )
    write_manifest(manifest, data_dir)
    return manifest
