"""Writes what an index finds, and the vectors of users and items, as Parquet with raw ids."""

import pathlib
import typing

import numpy as np
import pyarrow as pa

from gpsd_dist.features import raw_ids
from gpsd_dist.schema import NUM_RESERVED_ROWS
from gpsd_dist.serving import request_files
from gpsd_dist.serving.request_files import Part
from gpsd_dist.serving.requests import USER
from gpsd_dist.serving.retriever import Retriever

_VERSION = pa.field("version", pa.dictionary(pa.int32(), pa.string()))
_WHO = [pa.field(USER, pa.string()), pa.field("request", pa.int64())]
_FOUND = [pa.field("rank", pa.int32()), pa.field("item_id", pa.string()), pa.field("score", pa.float32())]
_ITEMS_AT_ONCE = 1 << 16


def search(retriever: Retriever, requests: pathlib.Path, top: int, out_dir: pathlib.Path) -> int:
    """Writes a row per item that was found: user_id, request, rank (from 1), item_id, score, version."""
    schema = pa.schema([*_WHO, *_FOUND, _VERSION])

    def found(part: Part) -> pa.Table:
        row_BK, score_BK = retriever.search_tokens(part.tokens, top)
        owner_N, rank_N = np.nonzero(row_BK >= 0)
        items = retriever.raw_ids.take(pa.array(row_BK[owner_N, rank_N] - NUM_RESERVED_ROWS))
        columns = [pa.array((rank_N + 1).astype(np.int32)), items, pa.array(score_BK[owner_N, rank_N])]
        return pa.table([*_who(part, owner_N), *columns, _version(retriever, len(owner_N))], schema=schema)

    return request_files.write(out_dir, schema, map(found, request_files.read(retriever.reader, requests)))


def users(retriever: Retriever, requests: pathlib.Path, out_dir: pathlib.Path) -> int:
    """Writes a row per request: user_id, request, vector (zeros where nothing is known of the history), version."""
    schema = pa.schema([*_WHO, pa.field("vector", _vectors(retriever)), _VERSION])

    def encoded(part: Part) -> pa.Table:
        vector_BE = retriever.encode(part.tokens)
        who = _who(part, np.arange(len(vector_BE)))
        return pa.table([*who, _lists(vector_BE), _version(retriever, len(vector_BE))], schema=schema)

    return request_files.write(out_dir, schema, map(encoded, request_files.read(retriever.reader, requests)))


def items(retriever: Retriever, out_dir: pathlib.Path) -> int:
    """Writes a row per item: item_id, vector, version; and `bias`, to be added to a cosine, where one was learnt."""
    bias_V = retriever.bias_V
    added = [] if bias_V is None else [pa.field("bias", pa.float32())]
    schema = pa.schema([pa.field("item_id", pa.string()), pa.field("vector", _vectors(retriever)), _VERSION, *added])

    def parts() -> typing.Iterator[pa.Table]:
        for first in range(NUM_RESERVED_ROWS, retriever.vectors.num_rows, _ITEMS_AT_ONCE):
            row_N = np.arange(first, min(first + _ITEMS_AT_ONCE, retriever.vectors.num_rows))
            ids = retriever.raw_ids.slice(first - NUM_RESERVED_ROWS, len(row_N))
            vectors = _lists(retriever.vectors.rows(row_N).numpy())
            added = [] if bias_V is None else [pa.array(bias_V[row_N])]
            yield pa.table([ids, vectors, _version(retriever, len(row_N)), *added], schema=schema)

    return request_files.write(out_dir, schema, parts())


def _who(part: Part, owner_N: np.ndarray) -> list[pa.Array]:
    users = pa.nulls(len(part.sent), pa.string()) if USER not in part.sent.column_names else raw_ids(part.sent[USER])
    return [users.take(pa.array(owner_N)), pa.array(part.first + owner_N)]


def _version(retriever: Retriever, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [retriever.version])


def _vectors(retriever: Retriever) -> pa.DataType:
    return pa.list_(pa.float32(), retriever.vectors.width)


def _lists(vector_NE: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vector_NE.reshape(-1)), vector_NE.shape[1])
