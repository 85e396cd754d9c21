"""Reads a whole split with pyarrow, batch after batch, for what is no training: baselines, counts, events of items.

Shape letter: V rows of a table.
"""

import collections.abc
import contextlib
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpsd_dist import schema
from gpsd_dist.data.hashing import hashed_rows
from gpsd_dist.data.parquet_dataset import ParquetSplit

MAX_COUNTED_ROWS = 2**31  # 16 GiB of counters
_BATCH_ROWS = 8192  # bounds the memory that a batch takes


def pretrain_counts(data_dir: str | os.PathLike, manifest: schema.Manifest, feature: schema.Feature) -> np.ndarray:
    """Counts how often each index of a token feature occurs in the pretraining histories, int64 [rows of its table].

    Zeros if the data set has no pretraining rows.
    """
    num_rows = manifest.table(feature.table).num_rows
    if num_rows > MAX_COUNTED_ROWS:
        raise ValueError(f"table {feature.table!r} has {num_rows} rows, at most {MAX_COUNTED_ROWS} are counted")
    counts_V = np.zeros(num_rows, np.int64)
    if not any(split.num_rows for split in manifest.splits if split.name == "pretrain"):
        return counts_V
    for batch in read_batches(data_dir, manifest, "pretrain", [f"history.{feature.name}"]):
        index = pc.list_flatten(batch[f"history.{feature.name}"])
        index = pc.list_flatten(index) if feature.is_bag else index
        counts_V += np.bincount(index.to_numpy(zero_copy_only=False), minlength=len(counts_V))
    return counts_V


def read_batches(
    data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, columns: collections.abc.Sequence[str]
) -> collections.abc.Iterator[pa.RecordBatch]:
    """Yields row batches of one split, in file order. Ids of a table without a vocabulary are hashed to its rows.

    ValueError names a file that is missing, broken or of another schema, or holds a value that breaks the contract.
    """
    data = ParquetSplit(os.fspath(data_dir), manifest, split, columns, cache_bytes=0)
    with contextlib.closing(data):
        for number, group in enumerate(data.groups):
            for batch in data.read_group(number).to_batches(max_chunksize=_BATCH_ROWS):
                try:
                    for column in columns:
                        _check_values(batch[column], column, manifest)
                except ValueError as error:
                    raise ValueError(f"{group.path}: {error}; correct it, or build the data set again") from error
                yield _with_hashed_ids(batch, manifest) if manifest.unbounded else batch


def _check_values(column: pa.Array, name: str, manifest: schema.Manifest) -> None:
    """Checks that only labels and times hold nulls, indices lie inside their table, labels are 0, 1 or null."""
    place, _, rest = name.partition(".")
    values = column
    while pa.types.is_list(values.type):
        may_be_null = place == "context" or pa.types.is_list(column.type.value_type)  # a bag may be null
        if values.null_count and not may_be_null:
            raise ValueError(f"column {name!r} has {values.null_count} nulls where a list belongs")
        values = pc.list_flatten(values)
    if place == "label":
        array = values.to_numpy(zero_copy_only=False)
        if not ((array == 0) | (array == 1) | values.is_null().to_numpy(zero_copy_only=False)).all():
            raise ValueError(f"column {name!r} holds a label that is not 0, 1 or null")
    elif place == "sampling":
        array = values.to_numpy(zero_copy_only=False)  # null becomes NaN
        is_good = (array > 0) & (array <= 1) if rest == "negative_rate" else (array >= 0) & np.isfinite(array)
        if not is_good.all():
            raise ValueError(f"column {name!r} holds {array[~is_good][0]}, which is no weight or no rate")
    elif values.null_count and name != "history.time_s":
        raise ValueError(f"column {name!r} has {values.null_count} nulls")
    elif place in schema.PLACES and rest != "time_s" and manifest.feature(rest).table is not None and len(values):
        num_rows = manifest.value_limit(manifest.feature(rest).table)
        found = pc.min_max(values).as_py()
        if not 1 <= found["min"] <= found["max"] < num_rows:
            raise ValueError(
                f"column {name!r} holds {found['min']} .. {found['max']}, expected 1 .. {num_rows - 1} of table "
                f"{manifest.feature(rest).table!r}"
            )


def _with_hashed_ids(batch: pa.RecordBatch, manifest: schema.Manifest) -> pa.RecordBatch:
    tables = {f"{place}.{f.name}": f.table for f in manifest.features for place in f.places}
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name, table in tables.items():
        if name in columns and table in manifest.unbounded:
            columns[name] = _hashed(columns[name], manifest.table(table).num_rows)
    return pa.RecordBatch.from_pydict(columns)


def _hashed(values: pa.Array, num_rows: int) -> pa.Array:
    """Replaces ids by rows in lists of any depth; a null stays null."""
    if pa.types.is_list(values.type):
        inner = _hashed(values.flatten(), num_rows)
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        is_null = pc.is_null(values) if values.null_count else None
        return pa.ListArray.from_arrays(pa.array(offsets), inner, mask=is_null)
    ids = pc.fill_null(values, schema.UNKNOWN_INDEX).to_numpy(zero_copy_only=False)
    is_null = values.is_null().to_numpy(zero_copy_only=False)
    return pa.array(hashed_rows(ids, num_rows), mask=is_null)
