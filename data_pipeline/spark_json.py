"""Gives Spark JSON functions under DuckDB's names and with its results, as far as `sources/json_lines.py` asks.

They run in Spark's Python workers: only the standard library.
"""

import json
import re
import typing

_PATH_STEP = re.compile(r'\."([^"]*)"|\[(\*|\d+)\]')
_BROKEN = object()
_KINDS = {dict: "OBJECT", list: "ARRAY", str: "VARCHAR", bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE"}


def is_valid(text: str | None) -> bool:
    """Tells whether the text is JSON."""
    return _parse(text) is not _BROKEN


def kind(text: str | None, path: str) -> str | None:
    """Names the kind of the value at the path, such as ARRAY; None where there is none."""
    values = _at(text, path)
    return _KINDS.get(type(values[0]), "NULL") if values else None


def extract(text: str | None, path: str) -> str | None:
    """Extracts the value at the path; a string without its quotes."""
    values = extract_all(text, path)
    return values[0] if values else None


def extract_all(text: str | None, path: str) -> list[str | None]:
    """Extracts all values at a path with wildcards."""
    return [_text(value) for value in _at(text, path)]


def _parse(text: str | None) -> typing.Any:
    try:
        return _BROKEN if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return _BROKEN


def _at(text: str | None, path: str) -> list[typing.Any]:
    """Finds all values at a path of the forms that are used here: $."key", [0] and [*]."""
    values = [_parse(text)]
    for key, index in _PATH_STEP.findall(path):
        found: list[typing.Any] = []
        for value in values:
            if index == "*":
                found += value if isinstance(value, list) else []
            elif index:
                found += value[int(index) : int(index) + 1] if isinstance(value, list) else []
            elif isinstance(value, dict) and key in value:
                found.append(value[key])
        values = found
    return [value for value in values if value is not _BROKEN]


def _text(value: typing.Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
