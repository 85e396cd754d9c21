"""Turns tokens of requests into the packed batch that the trained model takes, with the rows of tables that it needs.

Shape letters: B requests, T history tokens, C candidates, U distinct rows of a table, E embedding width.
"""

import collections.abc
import dataclasses

import numpy as np
import torch

from gpsd_dist.batch.batch import Bag, Batch, Column
from gpsd_dist.batch.packing import Packing, cuts
from gpsd_dist.batch.row_layout import ranges
from gpsd_dist.features import Values
from gpsd_dist.schema import Manifest
from gpsd_dist.serving.tables import MappedTable
from gpsd_dist.serving.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Packed:
    """Holds the input of `RankingModel.forward`, and the way back to the caller's order."""

    embeddings: dict[str, torch.Tensor]
    """Looked-up table -> float32 [U, E]"""
    batch: Batch
    history: list[Values]
    """Its columns in the order of the batch, as rows of tables: what a history is."""
    candidate_C: np.ndarray
    """int64: the caller's place of each candidate of the batch."""


def pack(tokens: Tokens, manifest: Manifest, tables: collections.abc.Mapping[str, MappedTable]) -> Packed:
    """Sorts requests by history length, plans their geometry, and reads each distinct row of `tables` once."""
    order = np.argsort(tokens.history_length_B, kind="stable")
    is_sorted = len(order) < 2 or bool((order[1:] > order[:-1]).all())
    ordered = dataclasses.replace(tokens, columns=_copied(tokens.columns)) if is_sorted else taken(tokens, order)
    item = manifest.item_feature
    columns, items = ordered.columns, [ordered.columns[place][item] for place in ("history", "candidate")]
    history = list(columns["history"].values())
    embeddings = {name: _look_up(table, manifest, columns) for name, table in tables.items()}
    tensors = {
        place: {name: _tensor(values) for name, values in features.items()} for place, features in columns.items()
    }
    batch = Batch(
        lookup=None,
        packing=Packing.from_lengths(ordered.history_length_B, ordered.candidate_count_B),
        history=tensors["history"],
        candidate=tensors["candidate"],
        context=tensors["context"],
        labels={},
        sampling={},
        history_item_T=torch.from_numpy(items[0]),
        candidate_item_C=torch.from_numpy(items[1]),
        history_time_s_T=torch.from_numpy(ordered.history_time_s_T),
        request_time_s_B=torch.from_numpy(ordered.request_time_s_B),
        user_hash_B=torch.zeros(len(order), dtype=torch.int64),
        source_row_B=torch.from_numpy(order),
    )
    return Packed(embeddings, batch, history, _entries(tokens.candidate_count_B, order))


def taken(tokens: Tokens, order: np.ndarray) -> Tokens:
    """Returns the requests `order` (int64, any of them, in any order)."""
    token_T = _entries(tokens.history_length_B, order)
    entries = {"history": token_T, "candidate": _entries(tokens.candidate_count_B, order), "context": order}
    columns = {
        place: {name: _take(values, entries[place]) for name, values in features.items()}
        for place, features in tokens.columns.items()
    }
    return Tokens(
        history_length_B=tokens.history_length_B[order],
        candidate_count_B=tokens.candidate_count_B[order],
        columns=columns,
        history_time_s_T=tokens.history_time_s_T[token_T],
        request_time_s_B=tokens.request_time_s_B[order],
        unknown_ids_B=tokens.unknown_ids_B[order],
        dropped_events_B=tokens.dropped_events_B[order],
        counts={},
    )


def _entries(count_B: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Finds the places of the tokens, or candidates, of the requests `order`: int64."""
    return ranges(cuts(count_B)[:-1][order], count_B[order])


def _look_up(table: MappedTable, manifest: Manifest, columns: dict[str, dict[str, Values]]) -> torch.Tensor:
    """Reads the distinct rows of a table, float32 [U, E], and replaces indices in `columns` by places among them."""
    users = [
        (features, name)
        for features in columns.values()
        for name in features
        if manifest.feature(name).table == table.name
    ]
    values = [_indices(features[name]) for features, name in users]
    index_U, place = np.unique(np.concatenate([*values, np.zeros(0, np.int64)]), return_inverse=True)
    parts = np.split(place, np.cumsum([len(value) for value in values]))
    for (features, name), part in zip(users, parts, strict=False):
        old = features[name]
        features[name] = (part, old[1]) if isinstance(old, tuple) else part
    return table.rows(index_U)


def _copied(columns: dict[str, dict[str, Values]]) -> dict[str, dict[str, Values]]:
    return {place: dict(features) for place, features in columns.items()}


def _take(values: Values, index: np.ndarray) -> Values:
    if not isinstance(values, tuple):
        return values[index]
    offsets = values[1]
    sizes = np.diff(offsets)[index]
    return values[0][ranges(offsets[:-1][index], sizes)], cuts(sizes)


def _indices(values: Values) -> np.ndarray:
    return values[0] if isinstance(values, tuple) else values


def _tensor(values: Values) -> Column:
    if isinstance(values, tuple):
        return Bag(torch.from_numpy(values[0]), torch.from_numpy(values[1]))
    return torch.from_numpy(values)
