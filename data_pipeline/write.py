"""Writes Parquet part files with the types of the contract and page checksums."""

import dataclasses
import math
import pathlib
import typing

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import canonical, progress
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions
from gpsd_dist import schema
from gpsd_dist.features import logarithm

FENCE = 3.0
"""A number is cut off that many ranges of its middle 98 % beyond it: data_pipeline/README.md, "Outliers"."""
QUANTILE_VALUES = 1 << 22
BUCKETS = 16  # of a number, by quantiles; untuned
ORDER_COLUMNS = ("shuffle_key", "split")


def write_split(
    engine: Engine,
    rows: ir.Table,
    manifest: schema.Manifest,
    name: str,
    folder: pathlib.Path,
    options: BuildOptions,
) -> schema.Split:
    """Writes one split in the order of `shuffle_key` (neither by time nor by label) and counts what it wrote.

    `folder` lies in the folder of the data set, and gets the part files.
    """
    folder.mkdir(parents=True)
    target_schema = schema.arrow_schema(manifest, name)
    ordered = rows.order_by("shuffle_key").drop(*[column for column in ORDER_COLUMNS if column in rows.columns])
    total = int(rows.count().execute())
    counts = {"num_rows": 0, "num_history_tokens": 0, "num_candidates": 0}
    times: list[int] = []
    writer = _PartWriter(folder, target_schema, options.row_group_rows, options.file_rows, options.compression)
    with progress.bar() as shown, writer:
        bar = shown.add_task(f"  write {folder.name}", total=total)
        for batch in engine.batches(ordered, options.row_group_rows):
            table = _to_schema(pa.Table.from_batches([batch]), target_schema)
            writer.write(table)
            counts["num_rows"] += table.num_rows
            counts["num_history_tokens"] += pc.sum(table["history_length"]).as_py() or 0
            if "request_time_s" in table.column_names and table.num_rows:
                counts["num_candidates"] += pc.sum(
                    pc.list_value_length(table[_first_candidate_column(target_schema)])
                ).as_py()
                bounds = pc.min_max(table["request_time_s"]).as_py()
                times += [bounds["min"], bounds["max"]]
            shown.update(bar, advance=table.num_rows)
    files = tuple(f"{folder.name}/{path.name}" for path in writer.paths)
    return schema.Split(name, files, **counts, time_from_s=min(times, default=None), time_to_s=max(times, default=None))


def _first_candidate_column(target_schema: pa.Schema) -> str:
    return next(column for column in target_schema.names if column.startswith("candidate."))


def _to_schema(table: pa.Table, target_schema: pa.Schema) -> pa.Table:
    """Orders and casts the columns; every cast is checked for overflow, except float64 to float32, which rounds."""
    columns = [table[field.name].cast(field.type, safe=True) for field in target_schema]
    return pa.table(columns, schema=target_schema)


def encodings(target_schema: pa.Schema) -> dict[str, typing.Any]:
    """Chooses options of `pq.ParquetWriter`: integers as bit-packed differences, text by a dictionary.

    Differences decode at 1.9 times the speed of a dictionary at no larger size (docs/performance.md).
    """
    integers = {path for path, leaf in _leaves(target_schema) if pa.types.is_integer(leaf)}
    texts = [path for path, leaf in _leaves(target_schema) if pa.types.is_string(leaf)]
    return {"use_dictionary": texts, "column_encoding": dict.fromkeys(sorted(integers), "DELTA_BINARY_PACKED")}


def _leaves(target_schema: pa.Schema) -> typing.Iterator[tuple[str, pa.DataType]]:
    """Yields (path in the file, type) of every column, lists by their elements."""
    for field in target_schema:
        path, leaf = field.name, field.type
        while pa.types.is_list(leaf):
            path, leaf = f"{path}.list.element", leaf.value_type
        yield path, leaf


class _PartWriter:
    """Writes Parquet files of at most `file_rows` rows in groups of `row_group_rows`; `paths` lists them in order."""

    def __init__(
        self, folder: pathlib.Path, target_schema: pa.Schema, row_group_rows: int, file_rows: int, compression: str
    ):
        self.folder, self.schema = folder, target_schema
        self.row_group_rows, self.file_rows, self.compression = (
            row_group_rows,
            max(file_rows, row_group_rows),
            compression,
        )
        self.paths: list[pathlib.Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._rows_in_file = 0
        self._pending: list[pa.Table] = []
        self._num_pending = 0

    def __enter__(self) -> "_PartWriter":
        self._open()  # a split without rows gets a file too, so that readers find its schema
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self._num_pending:
            self._flush(self._num_pending)
        self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Adds rows; full row groups are written at once."""
        self._pending.append(table)
        self._num_pending += table.num_rows
        while self._num_pending >= self.row_group_rows:
            self._flush(self.row_group_rows)

    def _flush(self, num_rows: int) -> None:
        table = pa.concat_tables(self._pending)
        if self._rows_in_file + num_rows > self.file_rows:
            self._writer.close()
            self._open()
        self._writer.write_table(table.slice(0, num_rows), row_group_size=num_rows)
        self._rows_in_file += num_rows
        self._pending = [table.slice(num_rows)]
        self._num_pending -= num_rows

    def _open(self) -> None:
        path = self.folder / f"part-{len(self.paths):05d}.parquet"
        self.paths.append(path)
        self._rows_in_file = 0
        self._writer = pq.ParquetWriter(
            path, self.schema, compression=self.compression, write_page_checksum=True, **encodings(self.schema)
        )


def write_items(engine: Engine, rows: ir.Table, log: canonical.Log, root: pathlib.Path, options: BuildOptions) -> None:
    """Writes items.parquet: `index` (int64, ascending from 2) and one column per item attribute."""
    features = [spec.feature() for spec in log.features if spec.origin == "items"]
    fields = [pa.field("index", pa.int64())] + [pa.field(f.name, f.arrow_type("context")) for f in features]
    target_schema, path = pa.schema(fields), root / "items.parquet"
    with pq.ParquetWriter(path, target_schema, compression=options.compression, write_page_checksum=True) as writer:
        for batch in engine.batches(rows, 1 << 16):
            if batch.num_rows:
                writer.write_table(_to_schema(pa.Table.from_batches([batch]), target_schema))


def with_statistics(manifest: schema.Manifest, train: schema.Split, root: pathlib.Path) -> tuple[schema.Feature, ...]:
    """Returns the features, numerical ones with bounds, mean and standard deviation over the written training split.

    A feature in several places is measured at the candidate, then the context, then the history. Without rows, or for
    a constant, mean and standard deviation stay 0 and 1.
    """
    features = []
    for feature in manifest.features:
        if feature.kind == "numerical":
            place = next(place for place in ("candidate", "context", "history") if place in feature.places)
            column = f"{place}.{feature.name}"
            low, high, edges = _bounds(root, train.files, column, feature.log)
            mean, std = _mean_and_std(root, train.files, column, low, high, feature.log)
            feature = dataclasses.replace(feature, mean=mean, std=std, low=low, high=high, quantiles=edges)
            if low is not None or high is not None:
                shown = " to ".join("..." if bound is None else f"{bound:.6g}" for bound in (low, high))
                progress.warn(f"{column}: a model sees it from {shown}; the few values beyond are cut off there")
        features.append(feature)
    return tuple(features)


def _bounds(
    root: pathlib.Path, files: tuple[str, ...], column: str, is_log: bool
) -> tuple[float | None, float | None, tuple[float, ...]]:
    """Finds where to cut a number, or its log, off, and the edges of its buckets (never of its log).

    It is cut off FENCE times the range of its middle 98 % beyond that range.

    None where no value lies beyond, or where 98 % are equal: a rare flag must not be cut off. Quantiles are those of
    the first QUANTILE_VALUES values; rows lie in the order of a hash, so these are a random sample.
    """
    sample, num, least, most = [], 0, math.inf, -math.inf
    for values in _values(root, files, column, is_log):
        least, most = min(least, values.min()), max(most, values.max())
        if num < QUANTILE_VALUES:
            sample.append(values)
            num += len(values)
    if not num:
        return None, None, ()
    known = np.sort(np.concatenate(sample))
    edges = known[len(known) * np.arange(1, BUCKETS) // BUCKETS]
    edges = np.copysign(np.expm1(np.abs(edges)), edges) if is_log else edges
    place = min(max(len(known) // 100, 1), (len(known) - 1) // 2)
    low, high = known[place], known[-1 - place]
    below, above = float(low - FENCE * (high - low)), float(high + FENCE * (high - low))
    bounds = (below if least < below < high else None), (above if most > above > low else None)
    return *bounds, tuple(map(float, np.unique(edges.astype(np.float32))))  # as the columns hold them


def _values(root: pathlib.Path, files: tuple[str, ...], column: str, is_log: bool) -> typing.Iterator[np.ndarray]:
    """Yields the values of a numerical column, or their logs, float64, one row group in memory."""
    for name in files:
        file = pq.ParquetFile(root / name)
        for group in range(file.num_row_groups):
            values = file.read_row_group(group, columns=[column])[column].combine_chunks()
            values = values.flatten() if pa.types.is_list(values.type) else values
            if len(part := values.drop_null().to_numpy(zero_copy_only=False).astype("float64")):
                yield logarithm(part) if is_log else part


def _mean_and_std(
    root: pathlib.Path, files: tuple[str, ...], column: str, low: float | None, high: float | None, is_log: bool
) -> tuple[float, float]:
    """Measures the values of a column, cut off at the bounds; Chan's merge of moments is stable for large values."""
    count, mean, squares = 0, 0.0, 0.0
    for part in _values(root, files, column, is_log):
        part = part if low is high is None else np.clip(part, low, high)
        delta, total = part.mean() - mean, count + len(part)
        squares += ((part - part.mean()) ** 2).sum() + delta**2 * count * len(part) / total
        mean, count = mean + delta * len(part) / total, total
    std = math.sqrt(squares / count) if count else 0.0
    return (float(mean), std) if std > 0 else (float(mean), 1.0)
