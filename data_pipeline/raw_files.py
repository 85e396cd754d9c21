"""Reads raw files with the checks that a user's own data needs: every problem is a ValueError that says what to do."""

import csv
import gzip
import pathlib

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.engine import Engine

FILE_ORDER = "file_order"


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
    engine: Engine,
    path: pathlib.Path,
    columns: dict[str, str],
    *,
    separator: str = ",",
    header: list[str] | None = None,
) -> ir.Table:
    """Reads columns of a CSV (.csv, .csv.gz, .dat, .tsv, .txt) or Parquet file, cast to Ibis types such as "int64".

    `header`: names of the columns of a text file without a header line. The result also has the int64 column
    `file_order`, the row's place in the file (0-based data rows). An empty text field is null. ValueError for an empty
    or unreadable file, a missing column, or a value that is not of its type.
    """
    require_file(path, f"the columns {list(columns)}")
    if path.suffix == ".parquet":
        table = _open_parquet(engine, path, columns)
    else:
        table = _open_text(engine, path, columns, separator, header)
    try:
        raw = engine.store(engine.backend.number_rows(table.select(*columns), FILE_ORDER))
    except engine.read_errors as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} cannot be read to its end ({first_line}); it may be truncated or malformed: fetch it again"
        ) from error
    if raw.count().execute() == 0:
        raise ValueError(
            f"{path} has no rows, only a header; it should hold the columns {list(columns)}: fetch it again"
        )
    typed = raw.mutate(**{name: _typed(raw, name, kind) for name, kind in columns.items()})
    _check_values(path, raw, typed, columns)
    return typed


def _open_parquet(engine: Engine, path: pathlib.Path, columns: dict[str, str]) -> ir.Table:
    try:
        found = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file, perhaps truncated ({error}); fetch it again"
        ) from error
    _check_names(path, found.names, columns)
    for name, kind in columns.items():
        found_is_list, expected_is_list = pa.types.is_list(found.field(name).type), kind.startswith("array")
        if found_is_list != expected_is_list:
            raise ValueError(
                f"{path}, column {name!r}: found {found.field(name).type}, expected {kind}; convert the column to "
                "that type"
            )
    return engine.backend.read_parquet(path)


def _open_text(
    engine: Engine, path: pathlib.Path, columns: dict[str, str], separator: str, header: list[str] | None
) -> ir.Table:
    if header is None:
        names = _first_fields(path, separator)
        _check_names(path, names, columns)
    else:
        names = header
        found = len(_first_fields(path, separator))
        if found != len(names):
            raise ValueError(
                f"{path}: the first line has {found} fields, expected {len(names)}: {names}; check the separator"
            )
    try:
        return engine.backend.read_text(path, names, separator=separator, has_header=header is None, quote='"')
    except engine.read_errors as error:
        raise ValueError(
            f"{path} cannot be read as text with separator {separator!r} ({error}); check the file"
        ) from error


def _first_fields(path: pathlib.Path, separator: str) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            line = file.readline().rstrip("\r\n")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a readable UTF-8 text file ({error}); convert or fetch it again") from error
    if len(separator) > 1:  # ML-1M separates by "::"; the csv module takes one character only
        return line.split(separator)
    return next(csv.reader([line], delimiter=separator), [])


def _check_names(path: pathlib.Path, found: list[str], columns: dict[str, str]) -> None:
    for name, kind in columns.items():
        if name not in found:
            raise ValueError(
                f"{path} has no column {name!r} (expected as {kind}); found columns {found}: rename the column or use "
                "another file"
            )


def _typed(raw: ir.Table, name: str, kind: str) -> ir.Value:
    column = raw[name]
    if isinstance(column, ir.StringColumn):
        column = column.strip().nullif("")
        if kind.startswith("int"):
            return whole_number(column)
    return column if column.type() == ibis.dtype(kind) else column.try_cast(kind)


def whole_number(text: ir.StringValue) -> ir.IntegerValue:
    """Parses int64: "1.0" is an integer to most tools that wrote such a file, "1.5" is not (engines would round)."""
    number = text.try_cast("float64")
    whole = ibis.coalesce(text.try_cast("int64"), number.try_cast("int64"))
    return ibis.ifelse(number == number.floor(), whole, ibis.null("int64"))


def _check_values(path: pathlib.Path, raw: ir.Table, typed: ir.Table, columns: dict[str, str]) -> None:
    """Raises ValueError for the first value that the cast lost, by its 0-based data row (header not counted)."""
    for name, kind in columns.items():
        if raw[name].type() == ibis.dtype(kind):
            continue
        given = raw[name].strip().nullif("") if isinstance(raw[name], ir.StringColumn) else raw[name]
        both = raw.select(
            row=raw[FILE_ORDER], value=given.cast("string"), is_bad=given.notnull() & _typed(raw, name, kind).isnull()
        )
        bad = both.filter(both.is_bad)
        count = bad.count().execute()
        if count:
            first = bad.order_by("row").limit(1).execute().iloc[0]
            raise ValueError(
                f"{path}, column {name!r}, data row {first['row']}: found {first['value']!r}, expected {kind} "
                f"({count:,} such rows); "
                "correct the values or leave those rows out"
            )


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
