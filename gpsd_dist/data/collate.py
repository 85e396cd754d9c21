"""Turns Arrow rows into one packed `Batch`: truncation, next-item targets, negatives and one deduplicated lookup.

Runs in the loader's threads, on whole columns. `columns.py` reads and checks values, `negatives.py` draws,
`distinct.py` deduplicates. Shape letters: B requests, T history tokens, C candidates, M next-item positions,
G sets of negatives, N negatives per set.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpsd_dist.batch.batch import Bag, Batch, RawIds
from gpsd_dist.batch.packing import Packing, cuts
from gpsd_dist.batch.padding import pad_packing
from gpsd_dist.data.columns import ColumnReader
from gpsd_dist.data.distinct import Wanted, deduplicate
from gpsd_dist.data.gather import gather, one_chunk
from gpsd_dist.data.micro_batch import MicroBatch, indices, next_item_targets, with_targets, without_last
from gpsd_dist.data.negatives import Mixed, Sampler, draw_limit, uniform
from gpsd_dist.data.parquet_dataset import BadValue, BatchKey
from gpsd_dist.features import Values
from gpsd_dist.schema import NUM_RESERVED_ROWS, UNKNOWN_INDEX, Manifest


@dataclasses.dataclass(frozen=True)
class Collate:
    """Makes `num_parts` Batches of the rows of one step; they share one lookup (gradient accumulation; usually 1).

    Raises BadValue with column and row for a value that breaks the contract.
    """

    manifest: Manifest
    lookup_tables: tuple[str, ...]  # Tables that live in TorchRec collections; the others are indexed directly
    max_history_length: int  # Keeps this many most recent history tokens
    with_candidates: bool  # False in pretraining: the rows' candidates and context are not read
    negatives_per: str | None = None
    """Draw negatives for next-item targets: a set for each "group", "request" or "position". None: no such targets."""
    num_negative_groups: int = 1  # G where `negatives_per` is "group"
    num_negatives: int = 0  # N per set
    seed: int = 0
    num_parts: int = 1  # Rows are dealt round over this many batches by length, so that all cost about the same
    token_multiple: int = 0  # Also plan a padded geometry with numbers of tokens that are multiples of this; 0: do not
    sampler: Sampler | Mixed = uniform
    with_target_times: bool = False  # Says when each predicted event happened
    unknown_rate: float = 0.0
    """Share of the known ids that are read as unknown, of features whose table is not hashed."""

    def columns(self) -> tuple[str, ...]:
        """Lists the Parquet columns that a batch needs."""
        names = ["user_hash", "history_length", "history.time_s"]
        names += [f"history.{feature.name}" for feature in self.manifest.features_in("history")]
        # Pretraining never opens labels and candidates, so nothing of the ranking task can leak into it.
        if self.with_candidates:
            names += ["request_time_s"]
            for place in ("candidate", "context"):
                names += [f"{place}.{feature.name}" for feature in self.manifest.features_in(place)]
            names += [f"label.{task.name}" for task in self.manifest.tasks]
            names += [f"sampling.{name}" for name in self.manifest.sampling]
        return tuple(names)

    def __call__(self, rows: pa.Table, key: BatchKey) -> tuple[Batch, ...]:
        order, length = self._sort_by_length(rows)
        # Draws are a function of (seed, epoch, step, rank), so a resumed run draws the same.
        entropy = np.random.SeedSequence((self.seed, key.epoch, key.step, key.rank))
        random, limit = np.random.Generator(np.random.Philox(entropy)), draw_limit(self.manifest)
        parts = []
        for part in range(self.num_parts):
            # Every num_parts-th request of the sorted ones: micro-batches of consecutive requests would differ in
            # cost by as much as the shortest and the longest histories do.
            take = slice(part, None, self.num_parts)
            micro_batch = self._read(gather([rows], order[take]), order[take], length[take], random)
            # Negatives are drawn here and not in the step, so that their rows are deduplicated, and prefetched by
            # TorchRec, together with all others. Those of managed items are numbers that become rows in the step.
            if self.negatives_per is not None:
                num_sets = {
                    "group": self.num_negative_groups,
                    "request": micro_batch.packing.num_requests,
                    "position": len(micro_batch.target_token_M),
                }[self.negatives_per]
                micro_batch.negative_item_GN = self.sampler(random, num_sets, self.num_negatives, limit)
            parts.append(micro_batch)
        # One lookup for all parts: each table is exchanged between ranks once per step, however many parts there are.
        lookup, raw_ids = self._deduplicate(parts)
        return tuple(self._batch(micro_batch, key, lookup, raw_ids) for micro_batch in parts)

    def _sort_by_length(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Sorts requests by (truncated) history length, stable: (order [B], length [B])."""
        full_length = pc.fill_null(one_chunk(rows["history_length"]), -1).to_numpy().astype(np.int64)
        too_long = np.flatnonzero((full_length > self.manifest.max_history_length) | (full_length < 0))
        if len(too_long):
            allowed = f"0 .. {self.manifest.max_history_length} (max_history_length of the manifest)"
            row = int(too_long[0])
            raise BadValue("history_length", row, f"{rows['history_length'][row]} is outside {allowed}")
        length = np.minimum(full_length, self.max_history_length)
        # Requests of similar length become neighbours, so that attention can run in buckets with little padding. The
        # sort is stable, because numpy's default one may break ties differently on another processor.
        order = np.argsort(length, kind="stable")
        return order, length[order]

    def _read(
        self, rows: pa.Table, order: np.ndarray, length: np.ndarray, random: np.random.Generator | None = None
    ) -> MicroBatch:
        """Reads and checks the columns of some requests, as table indices and numbers; `random` drops known ids."""
        reader = ColumnReader(self.manifest, rows, order)
        item = self.manifest.item_feature
        # The most recent events are kept: they say the most about what comes next.
        kept = reader.last_entries(f"history.{item}", length)
        columns: dict[str, dict[str, Values]] = {"history": {}, "candidate": {}, "context": {}}
        scalars = {"user_hash": reader.integers("user_hash"), "request_time_s": np.full(len(order), -1, np.int64)}
        for feature in self.manifest.features_in("history"):
            columns["history"][feature.name] = reader.jagged(f"history.{feature.name}", feature, kept=kept)
        labels, sampling, counts = {}, {}, np.zeros(len(order), np.int64)
        if self.with_candidates:
            counts = reader.lengths(f"candidate.{item}")
            for feature in self.manifest.features_in("candidate"):
                columns["candidate"][feature.name] = reader.jagged(f"candidate.{feature.name}", feature, lengths=counts)
            for feature in self.manifest.features_in("context"):
                columns["context"][feature.name] = reader.flat(f"context.{feature.name}", feature)
            labels = {task.name: reader.labels(f"label.{task.name}", counts) for task in self.manifest.tasks}
            sampling = {name: reader.sampling(f"sampling.{name}", counts) for name in self.manifest.sampling}
            scalars["request_time_s"] = reader.integers("request_time_s")
        if self.unknown_rate and random is not None:
            self._forget(columns, random)
        time_s, target_M, is_input_T = reader.history_time_s(kept), np.zeros(0, np.int64), None
        if self.negatives_per:
            offsets = cuts(length)
            target_M = next_item_targets(offsets, indices(columns["history"][item]))
            is_input_T, length = without_last(offsets)
            # HSTU sees at a token when the next event happens. For the new last token that is the one left out.
            scalars["request_time_s"][length > 0] = time_s[offsets[1:][length > 0] - 1]
        packing = Packing.from_lengths(length, counts)
        return MicroBatch(order, packing, columns, labels, sampling, scalars, time_s, target_M, is_input_T)

    def _forget(self, columns: dict[str, dict[str, Values]], random: np.random.Generator) -> None:
        """Replaces a share of the known ids by the unknown one; in pretraining these are no targets then."""
        for features in columns.values():
            for name, column in features.items():
                table = self.manifest.feature(name).table
                if table is None or self.manifest.unbounded.get(table) == "hashed":
                    continue
                value_N = indices(column)
                is_lost_N = (random.random(len(value_N)) < self.unknown_rate) & (value_N >= NUM_RESERVED_ROWS)
                value_N = np.where(is_lost_N, UNKNOWN_INDEX, value_N)
                features[name] = (value_N, column[1]) if isinstance(column, tuple) else value_N

    def _deduplicate(self, parts: list[MicroBatch]) -> tuple[KeyedJaggedTensor, dict[str, RawIds]]:
        """Collects the distinct indices of each table, and notes in the parts where their own stand among those."""
        item_table = self.manifest.feature(self.manifest.item_feature).table
        wanted: dict[str, list[Wanted]] = {table: [] for table in self.lookup_tables}
        users = []
        for micro_batch in parts:
            micro_batch.rows.update({place: dict(features) for place, features in micro_batch.columns.items()})
            for place, features in micro_batch.columns.items():
                for name, column in features.items():
                    table = self.manifest.feature(name).table
                    if table in wanted:
                        wanted[table].append(Wanted(indices(column)))
                        users.append((micro_batch.rows[place], name, wanted[table][-1]))
        drawn = [(m, Wanted(m.negative_item_GN, is_draw=True)) for m in parts if m.negative_item_GN is not None]
        if drawn:
            wanted[item_table] += [want for _, want in drawn]
        # Each distinct row travels between ranks once, forward and backward. An item that occurs a hundred times in a
        # batch has its gradients added up here on its own rank, before they are sent.
        lookup, raw_ids = deduplicate(self.manifest, wanted)
        for features, name, want in users:
            old = features[name]
            features[name] = (want.position, old[1]) if isinstance(old, tuple) else want.position
        for micro_batch, want in drawn:
            micro_batch.negative_row_GN = want.position
        return lookup, raw_ids

    def _batch(
        self, micro_batch: MicroBatch, key: BatchKey, lookup: KeyedJaggedTensor, raw_ids: dict[str, RawIds]
    ) -> Batch:
        empty, item, packing = np.zeros(0, np.int64), self.manifest.item_feature, micro_batch.packing
        # CUDA graphs replay fixed shapes: rounding the sizes up leaves few shapes to record.
        padded = pad_packing(packing, self.token_multiple, self.max_history_length) if self.token_multiple else None
        rows = micro_batch.rows | {"history": micro_batch.of_tower(micro_batch.rows["history"])}
        columns = {place: {name: _tensor(c) for name, c in features.items()} for place, features in rows.items()}
        item_T = micro_batch.columns["history"][item]
        known = micro_batch.of_tower({"item": item_T, "time_s": micro_batch.history_time_s})
        next_item = None
        if micro_batch.negative_item_GN is not None and self.negatives_per is not None:
            next_item = micro_batch.next_item(item, self.negatives_per, self.sampler, self.with_target_times)
            padded = with_targets(padded, next_item) if self.negatives_per == "group" else padded
        return Batch(
            lookup=lookup,
            packing=packing,
            history=columns["history"],
            candidate=columns["candidate"],
            context=columns["context"],
            labels={task: _tensor(label) for task, label in micro_batch.labels.items()},
            sampling={name: _tensor(values) for name, values in micro_batch.sampling.items()},
            # Item indices stay beside their rows in the lookup: whether two items are the same (an accidental hit, an
            # item of the own history) is asked of indices, which are valid beyond this batch.
            history_item_T=_tensor(known["item"]),
            candidate_item_C=_tensor(micro_batch.columns["candidate"].get(item, empty)),
            history_time_s_T=_tensor(known["time_s"]),
            request_time_s_B=_tensor(micro_batch.scalars["request_time_s"]),
            user_hash_B=_tensor(micro_batch.scalars["user_hash"]),
            source_row_B=torch.from_numpy(micro_batch.order),
            next_item=next_item,
            padded=padded,
            epoch_and_step=(key.epoch, key.step),
            raw_ids=raw_ids,
            num_read_tokens=len(micro_batch.history_time_s),
        )


def _tensor(column: Values) -> torch.Tensor | Bag:
    if isinstance(column, tuple):
        return Bag(_tensor(column[0]), _tensor(column[1]))
    return torch.from_numpy(column if column.flags.writeable else column.copy())  # Arrow's own memory is read-only
