"""Reads Parquet files of raw requests, and writes what comes of them."""

import pathlib
import typing

import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist.disk.reading import raise_if_passing
from gpsd_dist.disk.writing import replacing
from gpsd_dist.serving.request_log import ADDED, COUNTERS_AGE, SCORE_PREFIX
from gpsd_dist.serving.requests import RequestError, RequestReader
from gpsd_dist.serving.tokens import Tokens

_REQUESTS_READ, _REQUESTS_AT_ONCE = 4096, 64  # untuned
PART_NAME = "part-00000.parquet"


class Part(typing.NamedTuple):
    """Some requests that follow one another."""

    first: int
    """Number of the first, counted over all files."""
    sent: pa.Table
    """Values as they stand in the file."""
    tokens: Tokens


def read(reader: RequestReader, requests: pathlib.Path) -> typing.Iterator[Part]:
    """Reads a file, or the .parquet files of a folder in the order of their names.

    What `gpsd_dist.serve --log_requests` adds to requests is passed over. ValueError names file, request and column.
    """
    if not requests.exists():
        raise ValueError(f"--requests {requests} does not exist; name a Parquet file, or a folder that has some")
    files = sorted(requests.glob("*.parquet")) if requests.is_dir() else [requests]
    if not files:
        raise ValueError(f"--requests {requests} has no .parquet file; name a file, or a folder that has some")
    first = 0
    for path in files:
        start = first
        try:
            for batch in pq.ParquetFile(path).iter_batches(_REQUESTS_READ):
                sent, begin = pa.Table.from_batches([batch]), first
                for tokens in reader.batches(_without_added(sent), _REQUESTS_AT_ONCE):
                    yield Part(first, sent.slice(first - begin, len(tokens)), tokens)
                    first += len(tokens)
        except RequestError as error:
            row = error.row + begin - start
            raise ValueError(f"{path}: {RequestError(error.column, row, error.reason)}") from error
        except (pa.ArrowException, OSError) as error:
            raise_if_passing(path, error)
            raise ValueError(f"{path} cannot be read as Parquet ({error}); write it again") from error


def is_logged(sent: pa.Table) -> bool:
    """Says whether a server wrote these requests."""
    return set(ADDED) <= set(sent.column_names)


def _without_added(sent: pa.Table) -> pa.Table:
    if not is_logged(sent):
        return sent
    added = {*ADDED, COUNTERS_AGE}
    return sent.drop_columns([n for n in sent.column_names if n in added or n.startswith(SCORE_PREFIX)])


def claim(out_dir: pathlib.Path) -> None:
    """Makes the folder of an output. ValueError if it has something in it."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"--out {out_dir} exists and is not an empty folder; name another one, or delete it")
    out_dir.mkdir(parents=True, exist_ok=True)


def write(out_dir: pathlib.Path, schema: pa.Schema, parts: typing.Iterable[pa.Table]) -> int:
    """Writes one file, whole or not at all, into a folder that is new or empty; returns its number of rows."""
    claim(out_dir)
    rows = 0
    with replacing(out_dir / PART_NAME) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(part)
            rows += len(part)
    return rows
