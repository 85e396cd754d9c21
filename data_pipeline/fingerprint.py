"""Answers whether anything changed since a data set was built, by one hash over raw files, options and code."""

import hashlib
import json
import pathlib

from gpsd_dist import features, schema
from gpsd_dist.disk import reading


def file_sha256(path: pathlib.Path) -> str:
    """Computes the hexadecimal sha256 of a file's bytes."""

    def read() -> str:
        with reading.open_read(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return reading.again(path, read)


def describe(files: dict[str, pathlib.Path], options: dict, source: str) -> dict:
    """Hashes the raw files, the options and this package's code.

    Returns "sources": entries for the manifest, "options": JSON-able options, "fingerprint": one hash over everything.
    The hash has no path of an option: it says where a raw file lies, and that file's content is hashed.
    """
    entries = [
        {"name": name, "path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name, path in files.items()
    ]
    plain = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in options.items()}
    identity = {
        "source": source,
        "files": sorted((entry["name"], entry["sha256"]) for entry in entries),
        "options": {name: None if isinstance(options[name], pathlib.Path) else plain[name] for name in plain},
        "code": _code_sha256(),
        "schema_version": schema.SCHEMA_VERSION,
    }
    return {
        "sources": tuple(entries),
        "options": plain,
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32],
    }


def with_rows(entries: tuple[dict, ...], rows_of: dict[str, int]) -> tuple[dict, ...]:
    """Returns the entries of `describe`'s "sources" with the number of rows that were read of each file."""
    return tuple(entry | ({"rows": rows_of[entry["path"]]} if entry["path"] in rows_of else {}) for entry in entries)


def _code_sha256() -> str:
    """Hashes every module of this package: whoever changes a transformation need not remember to raise a version."""
    package = pathlib.Path(__file__).parent
    hashes = [(str(path.relative_to(package)), file_sha256(path)) for path in sorted(package.rglob("*.py"))]
    hashes.append(("features.py", file_sha256(pathlib.Path(features.__file__))))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
