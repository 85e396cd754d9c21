"""The tiny data set with 64-bit ids instead of vocabulary indices in the columns of some tables."""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist import schema
from gpsd_dist.data.hashing import mix
from tests.integration.tiny_data import write_tiny_data


def id_of(index: int) -> int:
    """A 60-bit id for a vocabulary index; padding and unknown stay."""
    if index < schema.NUM_RESERVED_ROWS:
        return index
    return schema.NUM_RESERVED_ROWS + (int(mix(np.array([index]))[0]) & ((1 << schema.ID_BITS) - 1))


def write_unbounded_data(data_dir: pathlib.Path, tables: dict[str, tuple[str, int]], convert=id_of) -> schema.Manifest:
    """`tables`: name -> (hashed | managed, rows). `convert`: index in the tiny data set -> what is written."""
    manifest = write_tiny_data(data_dir)
    for split in manifest.splits:
        for file in split.files:
            groups = pq.ParquetFile(data_dir / file).metadata.row_group(0).num_rows
            pq.write_table(_converted(pq.read_table(data_dir / file), manifest, tables, convert), data_dir / file,
                           row_group_size=groups)  # fmt: skip
    sizes = {
        name: schema.Table(name, rows, schema.unbounded_fingerprint(kind, rows))
        for name, (kind, rows) in tables.items()
    }
    manifest = dataclasses.replace(
        manifest,
        unbounded={name: kind for name, (kind, _) in tables.items()},
        tables=tuple(sizes.get(table.name, table) for table in manifest.tables),
    )
    schema.write_manifest(manifest, data_dir)
    return schema.read_manifest(data_dir)


def _converted(rows: pa.Table, manifest: schema.Manifest, tables, convert) -> pa.Table:
    def walk(value):
        return [walk(entry) for entry in value] if isinstance(value, list) else convert(value)

    for feature in manifest.features:
        for place in feature.places:
            name = f"{place}.{feature.name}"
            if feature.table in tables and name in rows.column_names:
                column = rows.column_names.index(name)
                values = pa.array([walk(value) for value in rows[name].to_pylist()], rows.schema.field(name).type)
                rows = rows.set_column(column, rows.schema.field(name), values)
    return rows
