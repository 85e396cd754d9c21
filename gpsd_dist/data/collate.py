"""Arrow rows -> one packed `Batch`: checks, truncation, next-item targets, negatives and one deduplicated lookup.

Runs in the loader's threads, on whole columns (no per-row Python). Negatives are drawn here, so that the sparse
pipeline can prefetch their rows together with all others.
"""

import dataclasses
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpsd_dist.batch.batch import Bag, Batch, NextItem, RawIds
from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.padding import PaddedPacking, pad_packing
from gpsd_dist.data import negatives
from gpsd_dist.data.columns import ColumnReader, last, offsets_of
from gpsd_dist.data.distinct import Wanted, deduplicate
from gpsd_dist.data.gather import gather, one_chunk
from gpsd_dist.data.loader import BatchKey
from gpsd_dist.data.parquet_dataset import BadValue
from gpsd_dist.schema import NUM_RESERVED_ROWS, Manifest


@dataclasses.dataclass(frozen=True)
class Collate:
    """Callable (pa.Table, BatchKey) -> `num_parts` Batches that share one lookup (gradient accumulation; usually 1).

    Raises BadValue with column and row for a value that breaks the contract.
    """

    manifest: Manifest
    lookup_tables: tuple[str, ...]
    """Tables that live in TorchRec collections; the others are indexed directly."""
    max_history_length: int
    """Keeps this many most recent history tokens."""
    with_candidates: bool
    """False in pretraining: the rows' candidates and context are not read."""
    negatives_per: str | None = None
    """Draw negatives for next-item targets: a set for each "group", "request" or "position". None: no such targets."""
    num_negative_groups: int = 1
    """G, of "group"."""
    num_negatives: int = 0
    """N per set."""
    seed: int = 0
    num_parts: int = 1
    """Rows are dealt round over this many batches by length, so that all cost about the same."""
    token_multiple: int = 0
    """Also plan a padded geometry with numbers of tokens that are multiples of this; 0: do not."""

    def columns(self) -> tuple[str, ...]:
        """Parquet columns that a batch needs."""
        names = ["user_hash", "history_length", "history.time_s"]
        names += [f"history.{feature.name}" for feature in self.manifest.features_in("history")]
        if self.with_candidates:
            names += ["request_time_s"]
            for place in ("candidate", "context"):
                names += [f"{place}.{feature.name}" for feature in self.manifest.features_in(place)]
            names += [f"label.{task.name}" for task in self.manifest.tasks]
        return tuple(names)

    def __call__(self, rows: pa.Table, key: BatchKey) -> tuple[Batch, ...]:
        order, length = self._sort_by_length(rows)
        parts = []
        for part in range(self.num_parts):
            take = slice(part, None, self.num_parts)
            parts.append(self._read(gather([rows], order[take]), order[take], length[take]))
        random = np.random.Generator(
            np.random.Philox(np.random.SeedSequence((self.seed, key.epoch, key.step, key.rank)))
        )
        drawn = [self._draw_negatives(random, part) for part in parts]
        lookup = self._deduplicate(parts, drawn)
        place = key.epoch, key.step
        return tuple(self._batch(part, own, place, *lookup) for part, own in zip(parts, drawn, strict=True))

    def _read(self, rows: pa.Table, order: np.ndarray, length: np.ndarray) -> "_Part":
        """Checked columns of some requests, as table indices."""
        reader = ColumnReader(self.manifest, rows, order)
        item = self.manifest.item_feature
        kept = last(offsets_of(one_chunk(rows[f"history.{item}"])), length)
        columns: dict[str, dict] = {"history": {}, "candidate": {}, "context": {}}
        scalars = {"user_hash": reader.integers("user_hash"), "request_time_s": np.full(len(order), -1, np.int64)}
        for feature in self.manifest.features_in("history"):
            columns["history"][feature.name] = reader.jagged(f"history.{feature.name}", feature, kept=kept)
        labels, counts = {}, np.zeros(len(order), np.int64)
        if self.with_candidates:
            counts = np.diff(offsets_of(one_chunk(rows[f"candidate.{item}"])))
            for feature in self.manifest.features_in("candidate"):
                columns["candidate"][feature.name] = reader.jagged(f"candidate.{feature.name}", feature, lengths=counts)
            for feature in self.manifest.features_in("context"):
                columns["context"][feature.name] = reader.flat(f"context.{feature.name}", feature)
            labels = {task.name: reader.labels(f"label.{task.name}", counts) for task in self.manifest.tasks}
            scalars["request_time_s"] = reader.integers("request_time_s")
        packing = Packing.from_lengths(length, counts)
        target_M = _targets(packing, columns["history"][item]) if self.negatives_per else np.zeros(0, np.int64)
        return _Part(order, packing, columns, labels, scalars, reader.history_time_s(kept), target_M)

    def _batch(
        self,
        part: "_Part",
        negatives: "_Negatives | None",
        place: tuple[int, int],
        lookup: KeyedJaggedTensor,
        raw_ids: dict[str, RawIds],
    ) -> Batch:
        empty, item = np.zeros(0, np.int64), self.manifest.item_feature
        return Batch(
            lookup=lookup,
            packing=part.packing,
            **{place: {name: _tensor(c) for name, c in features.items()} for place, features in part.rows.items()},
            labels={task: _tensor(label) for task, label in part.labels.items()},
            history_item_T=_tensor(part.columns["history"][item]),
            candidate_item_C=_tensor(part.columns["candidate"].get(item, empty)),
            history_time_s_T=_tensor(part.history_time_s),
            request_time_s_B=_tensor(part.scalars["request_time_s"]),
            user_hash_B=_tensor(part.scalars["user_hash"]),
            source_row_B=torch.from_numpy(part.order),
            next_item=None if negatives is None else self._next_item(part, negatives),
            padded=self._padded(part.packing),
            place=place,
            raw_ids=raw_ids,
        )

    def _padded(self, packing: Packing) -> PaddedPacking | None:
        if not self.token_multiple:
            return None
        return pad_packing(packing, self.token_multiple, self.max_history_length)

    def _sort_by_length(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Requests by ascending (truncated) history length, stable; (order [B], length [B])."""
        full_length = pc.fill_null(one_chunk(rows["history_length"]), -1).to_numpy().astype(np.int64)
        too_long = np.flatnonzero((full_length > self.manifest.max_history_length) | (full_length < 0))
        if len(too_long):
            allowed = f"0 .. {self.manifest.max_history_length} (max_history_length of the manifest)"
            row = int(too_long[0])
            raise BadValue("history_length", row, f"{rows['history_length'][row]} is outside {allowed}")
        length = np.minimum(full_length, self.max_history_length)
        order = np.argsort(length, kind="stable")
        return order, length[order]

    def _draw_negatives(self, random: np.random.Generator, part: "_Part") -> "_Negatives | None":
        """Draws the negatives of one part; their number and ids are a function of (seed, epoch, step, rank) alone."""
        if self.negatives_per is None:
            return None
        sets = {
            "group": self.num_negative_groups,
            "request": part.packing.num_requests,
            "position": len(part.target_token_M),
        }
        shape = sets[self.negatives_per], self.num_negatives
        return _Negatives(negatives.uniform(random, shape, negatives.item_limit(self.manifest)))

    def _deduplicate(
        self, parts: list["_Part"], negatives: list["_Negatives | None"]
    ) -> tuple[KeyedJaggedTensor, dict[str, RawIds]]:
        """Fills `rows` of parts and negatives with positions in the distinct indices of each table; returns those."""
        item_table = self.manifest.feature(self.manifest.item_feature).table
        wanted: dict[str, list[Wanted]] = {table: [] for table in self.lookup_tables}
        users = []
        for part in parts:
            part.rows.update({place: dict(features) for place, features in part.columns.items()})
            for place, features in part.columns.items():
                for name, column in features.items():
                    table = self.manifest.feature(name).table
                    if table in wanted:
                        wanted[table].append(Wanted(_indices(column)))
                        users.append((part.rows[place], name, wanted[table][-1]))
        drawn = [(draw, Wanted(draw.item_GN, is_draw=True)) for draw in negatives if draw is not None]
        if drawn:
            wanted[item_table] += [want for _, want in drawn]
        lookup, raw_ids = deduplicate(self.manifest, wanted)
        for features, name, want in users:
            old = features[name]
            features[name] = (want.place, old[1]) if isinstance(old, tuple) else want.place
        for draw, want in drawn:
            draw.row_GN = want.place
        return lookup, raw_ids

    def _next_item(self, part: "_Part", negatives: "_Negatives") -> NextItem:
        target = part.target_token_M
        group_offsets: tuple[int, ...] | None = None
        if self.negatives_per == "request":
            group_offsets = tuple(np.searchsorted(target - 1, part.packing.history_offsets.numpy()).tolist())
        elif self.negatives_per == "group":  # any partition of the positions will do: equal parts
            group_offsets = tuple(np.linspace(0, len(target), len(negatives.item_GN) + 1).astype(np.int64).tolist())
        return NextItem(
            token_M=torch.from_numpy(target - 1),
            target_token_M=torch.from_numpy(target),
            item_M=torch.from_numpy(part.columns["history"][self.manifest.item_feature][target]),
            group_offsets=group_offsets,
            negative_item_GN=torch.from_numpy(negatives.item_GN),
            negative_row_GN=torch.from_numpy(negatives.row_GN),
        )


@dataclasses.dataclass
class _Part:
    """Columns of one batch while it is made. A bag is a pair (values, offsets)."""

    order: np.ndarray
    packing: Packing
    columns: dict[str, dict]
    """place -> feature -> table indices or numbers"""
    labels: dict[str, np.ndarray]
    scalars: dict[str, np.ndarray]
    """Columns that are no features: column -> int64 [B]"""
    history_time_s: np.ndarray
    target_token_M: np.ndarray
    """History tokens that the ones before them predict."""
    rows: dict[str, dict] = dataclasses.field(default_factory=dict)
    """`columns` with indices replaced by rows of the lookup."""


@dataclasses.dataclass
class _Negatives:
    item_GN: np.ndarray
    row_GN: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))


def _targets(packing: Packing, item_T: np.ndarray) -> np.ndarray:
    """int64 [M]: each history token but a request's first is the target of the one before, if its item is known."""
    is_target = item_T >= NUM_RESERVED_ROWS
    offsets = packing.history_offsets.numpy()
    is_target[offsets[:-1][np.diff(offsets) > 0]] = False
    return np.flatnonzero(is_target)


def _indices(column: typing.Any) -> np.ndarray:
    return column[0] if isinstance(column, tuple) else column


def _tensor(column: typing.Any) -> torch.Tensor | Bag:
    if isinstance(column, tuple):
        return Bag(_tensor(column[0]), _tensor(column[1]))
    return torch.from_numpy(column if column.flags.writeable else column.copy())  # Arrow's own memory is read-only
