"""Reads raw files with the checks that a user's own data needs: every problem is a ValueError that says what to do.

Files are opened here, by Python and Arrow, and stored in the engine batch by batch; no engine sees the name of a raw
file, so that none takes it for a pattern, for a column or for an option. `raw_values` converts what they hold.
"""

import collections.abc
import dataclasses
import pathlib
import typing

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import explain, progress, raw_values
from data_pipeline.engine import Engine
from data_pipeline.raw_values import Kind, Notes
from data_pipeline.text_files import TextFile, TextStyle
from gpsd_dist import features
from gpsd_dist.disk.reading import raise_if_passing

FILE_ORDER = "file_order"
CSV = TextStyle()
_BATCH_ROWS = 1 << 16


@dataclasses.dataclass(frozen=True)
class RawFile:
    """Holds what was read of one file."""

    table: ir.Table
    """The columns that were asked for, and the int64 `file_order`: 0, 1, ... by the row's place in the file."""
    num_rows: int
    end: int
    """`file_order` after that of the last row."""
    notes: dict[str, Notes]
    """Column -> what its conversion saw."""
    missing: tuple[str, ...] = ()
    """Optional keys that no line of a file of JSON lines has."""
    keys: tuple[str, ...] = ()
    """Those of its first line."""


def require_file(path: pathlib.Path, what: str) -> pathlib.Path:
    """Returns the path if it is a non-empty file; ValueError otherwise."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it should hold {what}: check --raw_dir")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); it should hold {what}: fetch it again")
    return path


def require_folder(raw_dir: pathlib.Path | None) -> pathlib.Path:
    """Returns the folder of raw files; ValueError if none is named or it does not exist."""
    if raw_dir is None:
        raise ValueError("this source reads files: give their folder with --raw_dir")
    if not raw_dir.is_dir():
        raise ValueError(f"--raw_dir {raw_dir} is not a folder; give the one with the raw files")
    return raw_dir


def read_columns(
    engine: Engine, path: pathlib.Path, columns: collections.abc.Mapping[str, str | Kind], *, style: TextStyle = CSV
) -> ir.Table:
    """Reads columns of a file as `read` does. ValueError for a file without rows."""
    require_file(path, f"the columns {list(columns)}")
    found = read(engine, path, columns, style=style)
    if not found.num_rows:
        raise ValueError(
            f"{path} has no rows, only a header; it should hold the columns {list(columns)}: fetch it again"
        )
    return found.table


def read(
    engine: Engine,
    path: pathlib.Path,
    columns: collections.abc.Mapping[str, str | Kind],
    *,
    style: TextStyle = CSV,
    constants: dict[str, str | None] | None = None,
    null_words: tuple[str, ...] = (),
    decimal: str = ".",
) -> RawFile:
    """Reads columns of a text (.csv, .tsv, .txt, .dat, also .gz) or Parquet file, each as its `Kind` or its name says.

    An empty text field is null, and so is one of `null_words`. `constants`: values of columns that the file may lack.
    ValueError for an unreadable file, a missing column, or a value that is not of its kind.
    """
    kinds = kinds_of(columns)
    source = ParquetFile(path) if path.suffix == ".parquet" else TextFile(path, style)
    constants = {name: value for name, value in (constants or {}).items() if name not in source.names}
    stored = list(dict.fromkeys(kind.column for kind in kinds.values() if kind.column not in constants))
    if source.names:
        check_names(path, source.names, stored)
    batches = source.batches(stored) if source.names else iter(())
    found = store(engine, path, batches, kinds, constants=constants, null_words=null_words, decimal=decimal)
    if isinstance(source, TextFile) and source.num_joined:
        progress.warn(
            f"{path}: {source.num_joined:,} rows hold a line end inside of quotes; they are read as one row each"
        )
    return found


def kinds_of(columns: collections.abc.Mapping[str, str | Kind]) -> dict[str, Kind]:
    """Looks up kinds by name, and completes the names of their columns."""
    found = {name: raw_values.KINDS[kind] if isinstance(kind, str) else kind for name, kind in columns.items()}
    return {name: dataclasses.replace(kind, column=kind.column or name) for name, kind in found.items()}


def store(
    engine: Engine,
    path: pathlib.Path,
    batches: typing.Iterator[pa.RecordBatch],
    columns: collections.abc.Mapping[str, str | Kind],
    *,
    constants: dict[str, str | None] | None = None,
    null_words: tuple[str, ...] = (),
    decimal: str = ".",
) -> RawFile:
    """Converts raw batches and stores them. A batch that has `file_order` keeps it. ValueError as of `read`."""
    kinds = kinds_of(columns)
    reader = _Converter(path, kinds, constants or {}, Notes(null_words, decimal))
    schema = pa.schema([(name, kind.type) for name, kind in kinds.items()] + [(FILE_ORDER, pa.int64())])
    table = engine.store_batches(schema, reader.converted(batches))
    reader.raise_if_bad()
    engine.rows_of[str(path)] = reader.num_rows
    return RawFile(table, reader.num_rows, reader.end, reader.notes)


class _Converter:
    """Converts the batches of one file, and keeps the first value of every column that is not of its kind."""

    def __init__(self, path: pathlib.Path, kinds: dict[str, Kind], constants: dict[str, str | None], notes: Notes):
        self.path, self.kinds, self.constants = path, kinds, constants
        self.num_rows = self.end = 0
        self.notes = {name: Notes(notes.null_words, notes.decimal) for name in kinds}
        self._bad: dict[str, tuple[int, str, int]] = {}

    def converted(self, batches: typing.Iterator[pa.RecordBatch]) -> typing.Iterator[pa.RecordBatch]:
        """Yields the batches with the types of the kinds, and the column `file_order`."""
        for batch in batches:
            places = pa.array(np.arange(self.num_rows, self.num_rows + batch.num_rows))
            if FILE_ORDER in batch.schema.names:
                places = batch[FILE_ORDER]
            values = [self._column(batch, name, places) for name in self.kinds]
            self.num_rows += batch.num_rows
            self.end = max(self.end, places[-1].as_py() + 1) if batch.num_rows else self.end
            yield pa.record_batch([*values, places], names=[*self.kinds, FILE_ORDER])

    def _column(self, batch: pa.RecordBatch, name: str, places: pa.Array) -> pa.Array:
        kind = self.kinds[name]
        if kind.column in self.constants:
            given = pa.array([self.constants[kind.column]] * batch.num_rows, pa.string())
        else:
            given = self._plain(batch, kind)
        try:
            values, is_bad = kind.convert(given, self.notes[name])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            words = f"{self.path}, column {kind.column!r}: found {given.type}, expected {kind.expected}"
            raise ValueError(f"{words} ({str(error)[:120]}); convert the column") from error
        if is_bad.any():
            row = int(np.argmax(is_bad))
            first = self._bad.get(name, (places[row].as_py(), str(given[row].as_py())[:80], 0))
            self._bad[name] = (*first[:2], first[2] + int(is_bad.sum()))
        return values

    def _plain(self, batch: pa.RecordBatch, kind: Kind) -> pa.Array:
        name, given = kind.column, batch.column(batch.schema.names.index(kind.column))
        try:
            given = features.plain(given)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.path}, column {name!r}: not UTF-8 text ({error}); write it as text") from error
        found_is_list = isinstance(given, _LISTS)
        if found_is_list != kind.is_list and not (kind.is_list and pa.types.is_string(given.type)):
            raise ValueError(
                f"{self.path}, column {name!r}: found {given.type}, expected {kind.expected}; convert the column to "
                "that type"
            )
        if kind.unit and pa.types.is_float32(given.type):
            raise ValueError(
                f"{self.path}, column {name!r}: found {given.type}, which holds 7 digits, so that times are rounded to "
                "minutes; write int64 or float64"
            )
        if pa.types.is_nested(given.type) and not found_is_list:
            raise ValueError(
                f"{self.path}, column {name!r}: found {given.type}, expected {kind.expected}; write its fields as "
                "columns of their own"
            )
        return given

    def raise_if_bad(self) -> None:
        """Raises ValueError for the first bad value of the first column that has any; data rows count from 0."""
        for name, (row, value, count) in self._bad.items():
            kind = self.kinds[name]
            raise ValueError(
                f"{self.path}, column {kind.column!r}, data row {row}: found {value!r}, expected {kind.expected} "
                f"({count:,} such rows); {kind.advice(value)}"
            )


_LISTS = (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray, pa.ListViewArray, pa.LargeListViewArray)


class ParquetFile:
    """One Parquet file, as `text_files.TextFile` is one text file. Page checksums are verified where it has them."""

    def __init__(self, path: pathlib.Path):
        """Reads the names of the columns. ValueError if the file is no Parquet file."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.names = list(pq.ParquetFile(file).schema_arrow.names)
        except (pa.ArrowInvalid, OSError) as error:
            raise_if_passing(path, error)
            raise ValueError(
                f"{path} is not a readable Parquet file, perhaps truncated ({str(error)[:200]}); fetch it again"
            ) from error

    def batches(self, names: list[str]) -> typing.Iterator[pa.RecordBatch]:
        """Streams those columns with the types of the file."""
        num_rows = 0
        try:
            with self.path.open("rb") as opened:
                file = pq.ParquetFile(opened, page_checksum_verification=True)
                for batch in file.iter_batches(_BATCH_ROWS, columns=names):
                    num_rows += batch.num_rows
                    yield batch
                expected = file.metadata.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise_if_passing(self.path, error)
            raise ValueError(
                f"{self.path} cannot be read to its end ({str(error)[:200]}); it may be truncated or damaged: fetch it "
                "again"
            ) from error
        if num_rows != expected:
            raise ValueError(f"{self.path} holds {num_rows:,} rows, but its footer says {expected:,}; fetch it again")


def check_names(path: pathlib.Path, found: list[str], needed: list[str]) -> None:
    """Raises ValueError for a needed column that the file lacks, or has twice."""
    for name in needed:
        if found.count(name) > 1:
            raise ValueError(
                f"{path} has {found.count(name)} columns {name!r}; found columns {found}: rename all but one of them"
            )
        if name not in found:
            shown = [found[place] or f"(column {place + 1} has no name)" for place in range(len(found))]
            near = explain.did_you_mean(name, found) if any(found) else ""
            near = near if near.startswith("did") else "rename the column or use another file"
            if len(found) == 1 and name in found[0]:
                near = "state the `separator` in [csv]"
            raise ValueError(f"{path} has no column {name!r}; found columns {shown}, expected {needed}: {near}")


def require_none(path: pathlib.Path, bad: ir.Table, column: str, expected: str, fix: str) -> None:
    """Raises ValueError for the first row of `bad` (which has `column` and file_order), if it has any."""
    count = bad.count().execute()
    if count:
        first = bad.order_by(FILE_ORDER).limit(1).select(FILE_ORDER, value=bad[column].cast("string")).execute().iloc[0]
        found = "nothing" if first["value"] is None or first["value"] != first["value"] else repr(first["value"])
        raise ValueError(
            f"{path}, column {column!r}, data row {first[FILE_ORDER]}: found {found}, expected {expected} ({count:,} "
            f"such rows); {fix}"
        )


def require_values(path: pathlib.Path, table: ir.Table, columns: tuple[str, ...]) -> None:
    """Raises ValueError for the first missing value in any of the columns."""
    for column in columns:
        bad = table.filter(table[column].isnull())
        require_none(path, bad, column, "a value in every row", "fill it in or leave the row out")


def require_one_of(path: pathlib.Path, table: ir.Table, column: str, values: tuple) -> None:
    """Raises ValueError for the first value that is none of `values`; null passes, `require_values` is for it."""
    bad = table.filter(table[column].notnull() & table[column].notin(values))
    require_none(path, bad, column, f"one of {values}", "correct the values or leave those rows out")


def require_unique(path: pathlib.Path, table: ir.Table, column: str) -> None:
    """Raises ValueError for the first value that a lookup file gives twice."""
    copies = ibis.window(group_by=column, order_by=table[FILE_ORDER])
    bad = table.mutate(copy=ibis.row_number().over(copies)).filter(ibis._.copy > 0)
    require_none(path, bad, column, "each value once", "remove the repeated rows")
