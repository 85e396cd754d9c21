"""Compares what Parquet files hold, however it lies in pages and row groups."""

import hashlib
import pathlib

import pyarrow.parquet as pq


def rows_sha256(path: pathlib.Path) -> str:
    """Hexadecimal sha256 of a Parquet file's column types and rows in order; every value passes through Python."""
    file = pq.ParquetFile(path)
    digest = hashlib.sha256(repr(file.schema_arrow.remove_metadata()).encode())
    for batch in file.iter_batches(batch_size=1 << 14):
        for row in batch.to_pylist():
            digest.update(repr(tuple(row.values())).encode())
    return digest.hexdigest()
