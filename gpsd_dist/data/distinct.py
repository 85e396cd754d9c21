"""Makes one lookup per table for all columns of a batch: distinct values, and where each column finds its own."""

import dataclasses

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpsd_dist.batch.batch import RawIds
from gpsd_dist.batch.lookup import lookup_of
from gpsd_dist.schema import Manifest

_DENSE_UNIQUE_ROWS = 4_000_000  # below this a mark per table row beats sorting the ids (5x at 100 k ids, 1 M rows)


@dataclasses.dataclass
class Wanted:
    """Holds values of one table, from one column or one draw of negatives, and their positions in the lookup."""

    value: np.ndarray
    is_draw: bool = False
    """Whether the values are negatives. For a managed table: random numbers, which become rows in the step."""
    position: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))


def deduplicate(manifest: Manifest, wanted: dict[str, list[Wanted]]) -> tuple[KeyedJaggedTensor, dict[str, RawIds]]:
    """Builds the lookup of every table in `wanted`, with the facts of managed tables; fills each `position`."""
    sections, raw_ids = [], {}
    for table, parts in wanted.items():
        if manifest.unbounded.get(table) == "managed":
            section, raw_ids[table] = _managed(parts)
        else:
            section = _distinct(parts, manifest.table(table).num_rows)
        sections.append(section)
    index = torch.from_numpy(np.concatenate([*sections, np.zeros(0, np.int64)]))
    return lookup_of(tuple(wanted), index, [len(section) for section in sections]), raw_ids


def _distinct(parts: list[Wanted], num_rows: int) -> np.ndarray:
    """Returns the distinct values, sorted."""
    if num_rows > _DENSE_UNIQUE_ROWS:
        unique, inverse = np.unique(_joined(parts), return_inverse=True)
        _cut(parts, inverse)
        return unique
    is_wanted = np.zeros(num_rows, bool)
    for part in parts:
        is_wanted[part.value] = True
    unique = np.flatnonzero(is_wanted)
    place = np.empty(num_rows, np.int64)
    place[unique] = np.arange(len(unique))
    for part in parts:
        part.position = place[part.value]
    return unique


def _managed(parts: list[Wanted]) -> tuple[np.ndarray, RawIds]:
    """Joins distinct ids and the draws as they are: the map says in the step which rows those are."""
    columns, draws = [p for p in parts if not p.is_draw], [p for p in parts if p.is_draw]
    unique, inverse, counts = np.unique(_joined(columns), return_inverse=True, return_counts=True)
    _cut(columns, inverse)
    drawn = _joined(draws)
    _cut(draws, len(unique) + np.arange(len(drawn)))
    return np.concatenate([unique, drawn]), RawIds(torch.from_numpy(counts), len(drawn))


def _joined(parts: list[Wanted]) -> np.ndarray:
    return np.concatenate([*(part.value.reshape(-1) for part in parts), np.zeros(0, np.int64)])


def _cut(parts: list[Wanted], places: np.ndarray) -> None:
    pieces = np.split(places, np.cumsum([part.value.size for part in parts]))
    for part, piece in zip(parts, pieces, strict=False):
        part.position = piece.reshape(part.value.shape)
