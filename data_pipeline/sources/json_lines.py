"""Reads JSON-lines files (.json, .jsonl, .ndjson, also .gz), one JSON object per line, out of core.

Never eval(). The "loose" metadata files of the Amazon 2014 release hold Python dict literals instead of JSON; with
`is_loose`, a line that is not JSON goes through `ast.literal_eval`, which builds constants only, and only up to
MAX_LITERAL_CHARS. What is neither is counted for the caller to report; more than MAX_BAD_SHARE of the lines is an
error.
"""

import ast
import collections.abc
import dataclasses
import json
import pathlib

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from data_pipeline import raw_files
from data_pipeline.engine import Engine

MAX_LITERAL_CHARS = 200_000  # a product page; untuned. Bounds what ast.literal_eval may be asked to parse
MAX_BAD_SHARE = 0.01
_NESTED = " (keys inside of objects are not read: write them at the top level)"
LINES_AT_ONCE = 100_000  # lines that Python holds; untuned
# JSON text cannot contain this separator unescaped, so that a line is one field.
_LINES = raw_files.TextStyle(separator="\x1f", columns=("line",), quote="", keeps_blank_lines=True)


@ibis.udf.scalar.builtin
def json_valid(text: str) -> bool:
    """Tells whether the text is JSON."""


@ibis.udf.scalar.builtin
def json_type(text: str, path: str) -> str:
    """Names the kind of the value at the path, such as ARRAY; null where there is none."""


@ibis.udf.scalar.builtin
def json_extract_string(text: str, path: str) -> str:
    """Extracts the value at the path; a string without its quotes."""


@ibis.udf.scalar.builtin
def json_extract_strings(text: str, path: str) -> list[str]:
    """Extracts all values at a path with wildcards."""


def is_json_lines(path: pathlib.Path) -> bool:
    """Tells whether the ending of the name says so."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return bool(suffixes) and suffixes[-1] in (".json", ".jsonl", ".ndjson")


def read_columns(
    engine: Engine,
    path: pathlib.Path,
    columns: collections.abc.Mapping[str, str],
    *,
    is_loose: bool = False,
    optional: tuple[str, ...] = (),
) -> tuple[ir.Table, int]:
    """Reads top-level keys as columns ("string", "int64", "float64", "array<string>"), and `file_order`.

    A list of lists becomes the flat array of its members, a single value an array of one. A key that no line has is a
    ValueError unless it is `optional`. Also returns the number of lines that were left out because they are neither
    JSON objects nor, with `is_loose`, Python dict literals; without `is_loose` such a line is a ValueError.
    """
    raw_files.require_file(path, f"JSON lines with the keys {list(columns)}")
    found, num_bad = read(engine, path, columns, is_loose=is_loose, optional=optional)
    if not found.num_rows:
        raise ValueError(f"{path} has only blank lines; it should hold one JSON object per line: fetch it again")
    return found.table, num_bad


def read(
    engine: Engine,
    path: pathlib.Path,
    columns: collections.abc.Mapping[str, str | raw_files.Kind],
    *,
    is_loose: bool = False,
    optional: tuple[str, ...] = (),
    constants: dict[str, str | None] | None = None,
    null_words: tuple[str, ...] = (),
) -> tuple[raw_files.RawFile, int]:
    """Reads as `read_columns` does; a file may be without rows. `constants`, `null_words`: as of `raw_files.read`."""
    lines = raw_files.read(engine, path, {"line": "line"}, style=_LINES).table
    lines, num_bad = _repair(engine, path, lines.filter(lines.line.notnull()), is_loose)
    keys = _first_keys(lines)
    constants = {name: value for name, value in (constants or {}).items() if name not in keys}
    kinds = {kind.column: kind for kind in raw_files.kinds_of(columns).values() if kind.column not in constants}
    raw = engine.store(
        lines.select(raw_files.FILE_ORDER, **{name: _value(lines.line, name, kind) for name, kind in kinds.items()})
    )
    missing = _check_keys(path, raw, keys, list(kinds), optional) if keys else []
    for name in [name for name, kind in kinds.items() if not kind.is_list]:
        _check_is_single(path, name, raw, lines)
    batches = engine.batches(raw.order_by(raw_files.FILE_ORDER), LINES_AT_ONCE)
    found = raw_files.store(engine, path, batches, columns, constants=constants, null_words=null_words)
    return dataclasses.replace(found, missing=tuple(missing), keys=tuple(keys)), num_bad


def _first_keys(lines: ir.Table) -> list[str]:
    first = lines.order_by(raw_files.FILE_ORDER).limit(1).line.execute()
    return list(json.loads(first.iloc[0])) if len(first) else []


def _repair(engine: Engine, path: pathlib.Path, lines: ir.Table, is_loose: bool) -> tuple[ir.Table, int]:
    """Turns lines into JSON objects, and counts those that could not be understood."""
    is_object = json_valid(lines.line).fill_null(False)
    is_object = ibis.ifelse(is_object, json_type(ibis.ifelse(is_object, lines.line, "null"), "$") == "OBJECT", False)
    marked = engine.store(lines.mutate(is_object=is_object))
    others = marked.filter(~marked.is_object)
    num_lines, num_others = int(marked.count().execute()), int(others.count().execute())
    if not is_loose:
        raw_files.require_none(path, others, "line", "one JSON object per line", "correct or remove the line")
    if num_others == 0:
        return marked.drop("is_object"), 0
    repaired = _literals_to_json(engine, others)
    num_bad = num_others - int(repaired.count().execute())
    if num_bad > MAX_BAD_SHARE * num_lines:
        fixed = others.anti_join(repaired, raw_files.FILE_ORDER)
        expected = f"a JSON object or a Python dict literal of at most {MAX_LITERAL_CHARS:,} characters"
        raw_files.require_none(
            path, fixed, "line", expected, "the file may be truncated or of another kind; fetch it again"
        )
    return marked.filter(marked.is_object).drop("is_object").union(repaired.select(*lines.columns)), num_bad


def _literals_to_json(engine: Engine, others: ir.Table) -> ir.Table:
    """Converts lines that hold a dict literal to JSON, part by part of the file: (line, file_order)."""
    schema = pa.schema([("line", pa.string()), (raw_files.FILE_ORDER, pa.int64())])
    place = others[raw_files.FILE_ORDER]
    parts = []
    for start in range(0, int(place.max().execute()) + 1, LINES_AT_ONCE):
        part = others.filter((place >= start) & (place < start + LINES_AT_ONCE)).to_pyarrow()
        texts = [_literal_to_json(text) for text in part["line"].to_pylist()]
        rows = [(text, order) for text, order in zip(texts, part[raw_files.FILE_ORDER].to_pylist()) if text is not None]
        table = pa.Table.from_pylist([dict(zip(schema.names, row)) for row in rows], schema=schema)
        parts.append(engine.store(table))
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]


def _literal_to_json(text: str) -> str | None:
    """Converts a Python dict literal to JSON; None where the text is none, or is too long to be parsed safely."""
    if len(text) > MAX_LITERAL_CHARS:
        return None
    try:
        value = ast.literal_eval(text.strip())
        return json.dumps(value) if isinstance(value, dict) else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # _repair counts the line
        return None


def _value(line: ir.Value, name: str, kind: raw_files.Kind) -> ir.Value:
    """Extracts the key `name` of the JSON text as a string, or as array<string>."""
    if '"' in name:
        raise ValueError(f"the key {name!r} has a quotation mark; rename it in the file")
    path = f'$."{name}"'
    if not kind.is_list:
        return json_extract_string(line, path)
    single = ibis.array([json_extract_string(line, path)])
    is_list = json_type(line, path) == "ARRAY"
    is_nested = json_type(line, f"{path}[0]") == "ARRAY"
    flat = ibis.ifelse(is_nested, json_extract_strings(line, f"{path}[*][*]"), json_extract_strings(line, f"{path}[*]"))
    return ibis.ifelse(
        is_list, flat, ibis.ifelse(json_extract_string(line, path).notnull(), single, ibis.null("array<string>"))
    )


def _check_is_single(path: pathlib.Path, name: str, raw: ir.Table, lines: ir.Table) -> None:
    """Raises ValueError where the value of a key is an object or a list: its text is no id, category or number."""
    seems = raw.filter(raw[name].startswith("{") | raw[name].startswith("["))
    if seems.count().execute():
        joined = lines.inner_join(seems.select(raw_files.FILE_ORDER, found=seems[name]), raw_files.FILE_ORDER)
        bad = joined.filter(json_type(joined.line, f'$."{name}"').isin(["OBJECT", "ARRAY"]))
        fix = "write what is in it under a key of its own at the top level"
        raw_files.require_none(path, bad.mutate(**{name: bad.found}), name, "a text or a number", fix)


def _check_keys(
    path: pathlib.Path, raw: ir.Table, keys: list[str], names: list[str], optional: tuple[str, ...]
) -> list[str]:
    """Lists the `optional` keys that no line has. ValueError for another one."""
    present = raw.agg([raw[name].notnull().any().fill_null(False).name(name) for name in names] or [raw.count()])
    missing = [name for name, is_there in present.execute().iloc[0].items() if not bool(is_there)]
    needed = [name for name in missing if name not in optional]
    if needed:
        raise ValueError(f"{path}: no line has the key {needed[0]!r}; the keys of the first line are {keys}{_NESTED}")
    return missing
