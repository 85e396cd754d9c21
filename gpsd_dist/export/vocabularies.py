"""Writes what turns raw ids into table rows: a sorted index per table, raw ids by row, attributes by item."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist.checkpoint.files import Reader
from gpsd_dist.checkpoint.storage import is_plain_name
from gpsd_dist.export.weights import managed_rows
from gpsd_dist.features import id_of
from gpsd_dist.schema import NUM_RESERVED_ROWS, Manifest, Table
from gpsd_dist.serving.artefact import Draft
from gpsd_dist.serving.items import Items
from gpsd_dist.serving.scorer import ITEMS_NAME, index_name
from gpsd_dist.serving.vocabulary import Vocabulary


def write_vocabularies(draft: Draft, data_dir: pathlib.Path, manifest: Manifest, reader: Reader) -> None:
    """Writes the index of every table but hashed ones, which need none. ValueError names a table that does not fit."""
    (draft.folder / "vocab").mkdir()
    for table in manifest.tables:
        if not is_plain_name(table.name):
            raise ValueError(f"table {table.name[:80]!r} cannot name a file; build the data with another name")
        kind = manifest.unbounded.get(table.name)
        if kind == "hashed":
            continue
        try:
            if kind == "managed":
                ids, rows = (part.numpy() for part in managed_rows(reader, table))
            else:
                raw = read_vocabulary(data_dir, table)
                pq.write_table(pa.table({"raw_id": raw}), draft.folder / f"vocab/{table.name}.parquet")
                ids, rows = id_of(raw), np.arange(NUM_RESERVED_ROWS, table.num_rows)
            Vocabulary.write(draft.folder / index_name(table.name), ids, rows)
        except ValueError as error:
            raise ValueError(f"table {table.name!r}: {error}") from error
    Items.write(draft.folder / ITEMS_NAME, data_dir / "items.parquet", manifest)


def read_vocabulary(data_dir: pathlib.Path, table: Table) -> pa.StringArray:
    """Reads the raw ids of a table by row, from row 2 on. ValueError if the vocabulary is not that of the table."""
    found = pq.read_table(data_dir / f"vocab/{table.name}.parquet", columns=["raw_id", "index"]).sort_by("index")
    index = found["index"].to_numpy()
    if not np.array_equal(index, np.arange(NUM_RESERVED_ROWS, table.num_rows)):
        raise ValueError(
            f"{data_dir}/vocab has {len(index):,} ids for it, expected one for each of {table.num_rows:,} rows but the "
            "first two; build the data again"
        )
    raw = found["raw_id"].combine_chunks().cast(pa.string())
    if raw.null_count or pc.any(pc.equal(raw, "")).as_py():
        raise ValueError(f"{data_dir}/vocab has an empty raw id for it; build the data again")
    return raw
