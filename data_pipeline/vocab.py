"""Builds vocabularies, raw id -> row of an embedding table, from the training period only.

Index 0 is padding, 1 is unknown (never seen in training, or fewer times than min_count); known ids follow from 2 by
falling count, equal counts by raw id, so that the same training data always gives the same table.
"""

import hashlib
import pathlib
import typing

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import hashing
from data_pipeline.engine import Engine
from gpsd_dist import schema

VOCAB_SCHEMA = pa.schema([("raw_id", pa.string()), ("index", pa.int64()), ("count", pa.int64())])


class Vocabulary(typing.NamedTuple):
    """Says how the ids of one embedding table become rows of it."""

    words: ir.Table | None
    """(raw_id, index, count); None: no vocabulary, and columns hold 64-bit ids."""
    table: schema.Table | None = None
    """The table as the manifest describes it; None: the vocabulary is new, and is measured when it is written."""


def build(engine: Engine, name: str, occurrences: ir.Table, min_count: int) -> ir.Table:
    """Builds a vocabulary (raw_id, index, count) from `occurrences` (raw_id string, count int64; ids may repeat)."""
    counts = _counts(occurrences)
    known = counts.filter(counts["count"] >= min_count)
    place = ibis.row_number().over(ibis.window(order_by=[known["count"].desc(), known.raw_id.asc()]))
    index = (place + schema.NUM_RESERVED_ROWS).cast("int64")
    return engine.materialise(f"vocab_{name}", known.select("raw_id", index=index, count=known["count"]))


def grow(
    engine: Engine, name: str, occurrences: ir.Table, min_count: int, old: ir.Table, num_old_rows: int
) -> ir.Table:
    """Grows a vocabulary: ids of `old` keep their index; those that now reach `min_count` follow by falling count.

    `occurrences` are of the whole training period, so that an id may reach `min_count` over many days.
    `num_old_rows`: rows of the old embedding table, the first new index.
    """
    counts = _counts(occurrences)
    kept = old.left_join(counts, old.raw_id == counts.raw_id)
    kept = kept.select(old.raw_id, old["index"], count=ibis.coalesce(counts["count"], ibis.literal(0, type="int64")))
    fresh = counts.filter(counts["count"] >= min_count).anti_join(old, "raw_id")
    place = ibis.row_number().over(ibis.window(order_by=[fresh["count"].desc(), fresh.raw_id.asc()]))
    fresh = fresh.select("raw_id", index=(place + num_old_rows).cast("int64"), count=fresh["count"])
    return engine.materialise(f"vocab_{name}", kept.union(fresh))


def _counts(occurrences: ir.Table) -> ir.Table:
    """Sums (raw_id, count) to one row per id that is not null."""
    return (
        occurrences.filter(occurrences.raw_id.notnull())
        .group_by("raw_id")
        .agg(count=lambda t: t["count"].cast("float64").sum().cast("int64"))
    )


def write(engine: Engine, vocab: ir.Table, path: pathlib.Path) -> tuple[int, str]:
    """Writes a vocabulary in index order; returns (rows of the embedding table, fingerprint)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = vocab.order_by("index")
    with pq.ParquetWriter(path, VOCAB_SCHEMA, compression="zstd") as writer:
        for batch in engine.batches(ordered, 1 << 17):
            if batch.num_rows:
                writer.write_batch(batch.cast(VOCAB_SCHEMA))
    return measure(path)


def write_all(engine: Engine, vocabularies: dict[str, Vocabulary], root: pathlib.Path) -> tuple[schema.Table, ...]:
    """Writes the vocabularies that are new to `root`; returns all tables as the manifest describes them."""
    return tuple(
        table or schema.Table(name, *write(engine, words, root / "vocab" / f"{name}.parquet"))
        for name, (words, table) in vocabularies.items()
    )


def measure(path: pathlib.Path) -> tuple[int, str]:
    """Measures a written vocabulary: (rows of the embedding table, hash over all (raw id, index) pairs)."""
    digest = hashlib.sha256()
    num_known = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1 << 17, columns=["raw_id", "index"]):
        for raw_id, index in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            digest.update(f"{index}\t{len(raw_id)}\t{raw_id}\n".encode())
        num_known += batch.num_rows
    return schema.NUM_RESERVED_ROWS + num_known, digest.hexdigest()[:32]


def read(engine: Engine, name: str, path: pathlib.Path) -> ir.Table:
    """Opens a written vocabulary, to encode more data with the same indices. ValueError where the file is missing."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: the data set is incomplete; build it again before adding a split to it"
        )
    with path.open("rb") as file:
        batches = pq.ParquetFile(file).iter_batches(columns=VOCAB_SCHEMA.names)
        return engine.materialise(f"vocab_{name}_read", engine.store_batches(VOCAB_SCHEMA, batches))


def encode(table: ir.Table, columns: dict[str, tuple[str, ir.Table]]) -> ir.Table:
    """Adds int64 columns of indices; unknown or null becomes 1. `columns`: new column -> (string column, vocabulary).

    All columns are joined in one query. A subquery for each would nest 30 deep for a table with 30 columns, which Ibis'
    SQL generator cannot write.
    """
    lookups = {
        into: words.select(**{f"_id_{into}": words.raw_id, f"_index_{into}": words["index"]})
        for into, (_, words) in columns.items()
    }
    table = table.view()  # if `table` is a join itself, Ibis would append these joins to its chain
    joined = table
    for into, (column, _) in columns.items():
        joined = joined.left_join(lookups[into], table[column] == lookups[into][f"_id_{into}"])
    kept = [table[name] for name in table.columns if name not in columns]
    unknown = ibis.literal(schema.UNKNOWN_INDEX, type="int64")
    return joined.select(*kept, **{into: ibis.coalesce(lookups[into][f"_index_{into}"], unknown) for into in columns})


def encode_bag(table: ir.Table, key: str, column: str, words: ir.Table | None) -> ir.Table:
    """Encodes the array<string> column `column` to rows (_key, _bag), where a bag holds indices in ascending order.

    Equal indices stay, such as those of two unknown ids. Without a vocabulary (`words` None) a bag holds 64-bit ids.
    `key` must be unique in `table`; its rows with a missing or empty bag have no row in the result.
    """
    members = table.select(_key=table[key], _raw=table[column].unnest())
    if words is None:
        encoded = members.mutate(_index=hashing.id_of(members["_raw"]))
    else:
        encoded = encode(members, {"_index": ("_raw", words)})
    return encoded.group_by("_key").agg(_bag=encoded["_index"].collect().sort())
