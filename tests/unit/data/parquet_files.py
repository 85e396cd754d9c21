"""Small splits of Parquet files with unequal row groups, and the manifest that fits them."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist import schema

FILES = ((7, 1, 13), (5,), (9, 2, 4, 11))  # rows of the row groups of each file
NUM_ROWS = sum(sum(groups) for groups in FILES)


def make_manifest(num_rows: int, num_tokens: int, files: tuple[str, ...]) -> schema.Manifest:
    places = ("history", "candidate")
    return schema.Manifest(
        source="test",
        features=(
            schema.Feature("item", places, table="item"),
            schema.Feature("tags", places, table="tag", is_bag=True),
        ),
        tables=(schema.Table("item", 10_000, "a"), schema.Table("tag", 100, "b")),
        tasks=(schema.Task("click"),),
        splits=(schema.Split("pretrain", files, num_rows, num_tokens, 0, None, None),),
        max_history_length=50,
    )


def write_split(data_dir: pathlib.Path, files=FILES, *, lengths=None, compression="lz4") -> schema.Manifest:
    """Writes a `pretrain` split; row i has user_hash i and a history that is made of i's."""
    num_rows = sum(sum(groups) for groups in files)
    if lengths is None:
        lengths = np.random.default_rng(3).integers(0, 12, num_rows)
    names = tuple(f"pretrain/part-{index:05d}.parquet" for index in range(len(files)))
    manifest = make_manifest(num_rows, int(lengths.sum()), names)
    table = make_table(manifest, lengths)
    (data_dir / "pretrain").mkdir(parents=True)
    start = 0
    for name, groups in zip(names, files):
        options = {"compression": compression, "write_page_checksum": True}
        with pq.ParquetWriter(data_dir / name, table.schema, **options) as writer:
            for rows in groups:
                writer.write_table(table.slice(start, rows), row_group_size=rows)
                start += rows
    return manifest


def make_table(manifest: schema.Manifest, lengths) -> pa.Table:
    row = np.arange(len(lengths))
    values = {
        "user_id": [f"user-{i}" for i in row],
        "user_hash": row,
        "history_length": lengths,
        "history.item": [[int(i)] * int(n) for i, n in zip(row, lengths)],
        "history.tags": [[[int(i) % 7]] * int(n) for i, n in zip(row, lengths)],
        "history.time_s": [[None] * int(n) for n in lengths],
    }
    return pa.table(values, schema=schema.arrow_schema(manifest, "pretrain"))
