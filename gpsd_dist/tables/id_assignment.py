"""Gives the ids of managed tables their rows, just before the lookup: in training with admission and eviction.

The map of a table is the same on every rank, because every rank makes the same updates: with the ids of all ranks.

Shape letters: U distinct ids of a rank's batch, A those of all ranks (with repeats), N draws, M next-item positions.
"""

import dataclasses
import re
import typing

import torch

from gpsd_dist.batch.batch import Batch, NextItem, lookup_of
from gpsd_dist.distributed.collectives import all_gather_rows
from gpsd_dist.schema import UNKNOWN_INDEX, Manifest
from gpsd_dist.tables.managed_collision import ManagedMap

Reset: typing.TypeAlias = typing.Callable[[torch.Tensor, int], None]
"""(rows that got a new id, number of the update): new weights, no optimizer state."""


class IdAssignment:
    """The managed tables of a run; without any, batches pass as they are."""

    def __init__(self, manifest: Manifest, maps: dict[str, ManagedMap], resets: typing.Mapping[str, Reset]):
        """`resets`: of the tables that are trained; the maps of the others never change."""
        item = manifest.feature(manifest.item_feature)
        self._item_feature, self._item_table = item.name, item.table
        self._maps, self._resets = maps, resets
        self._metrics: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Of the last `train`, over all ranks: `ids/<table>_rows_used` (part of the rows that belong to an id),
        `ids/<table>_changed_rows`, and `ids/<table>_unknown` (part of the occurrences that read the unknown row).
        """
        return self._metrics

    def train(self, batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        """Counts, admits and evicts, then assigns rows to the parts of a batch. Collective: all ranks must call."""
        first = batches[0]
        for table in first.raw_ids:  # in the order of the lookup: the same on every rank
            if table not in self._resets:
                continue
            raw, id_U = first.raw_ids[table], self._section(first, table)[0]
            id_A = torch.cat(all_gather_rows(id_U))
            count_A = torch.cat(all_gather_rows(raw.count_U))
            distinct, place_A = id_A.unique(return_inverse=True)
            counts = torch.zeros_like(distinct).index_add_(0, place_A, count_A)
            managed = self._maps[table]
            changed = managed.update(distinct, counts)
            self._resets[table](changed, managed.num_updates)
            self._measure(table, changed, distinct, counts)
        return self.assign(batches)

    def assign(self, batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        """Rows for ids by the maps as they are; an id without a row of its own reads the unknown row."""
        if not batches[0].raw_ids:
            return batches
        names = tuple(batches[0].lookup.keys())
        sections, item = [], None
        for table in names:
            section = batches[0].lookup[table].values()
            if table in batches[0].raw_ids:
                assigned = self._assigned(batches[0], table)
                section = torch.cat([assigned.row_U, assigned.drawn])
                item = assigned if table == self._item_table else item
            sections.append(section)
        lookup = lookup_of(names, torch.cat(sections), [len(section) for section in sections])
        return tuple(self._with_rows(dataclasses.replace(part, lookup=lookup, raw_ids={}), item) for part in batches)

    def occupied(self, table: str, device: torch.device) -> torch.Tensor | None:
        """Rows that belong to an id, ascending; None if the table is not managed: then all known rows do."""
        return self._maps[table].occupied().to(device) if table in self._maps else None

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Table -> live tensors of its map, for checkpoints; the same on every rank."""
        return {table: managed.state() for table, managed in self._maps.items()}

    def _measure(self, table: str, changed: torch.Tensor, distinct: torch.Tensor, counts: torch.Tensor) -> None:
        managed, name = self._maps[table], re.sub("[^A-Za-z0-9_]", "_", table)
        unknown = counts[managed.rows(distinct) == UNKNOWN_INDEX].sum() / counts.sum().clamp(min=1)
        self._metrics[f"ids/{name}_rows_used"] = managed.part_used
        self._metrics[f"ids/{name}_changed_rows"] = float(len(changed))
        self._metrics[f"ids/{name}_unknown"] = float(unknown)

    def _section(self, batch: Batch, table: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(distinct ids [U], draws [N]) of a table in the lookup."""
        section = batch.lookup[table].values()
        num_ids = len(section) - batch.raw_ids[table].num_draws
        return section[:num_ids], section[num_ids:]

    def _assigned(self, batch: Batch, table: str) -> "_Assigned":
        id_U, draw_N = self._section(batch, table)
        row_N = torch.full_like(draw_N, UNKNOWN_INDEX)
        if len(draw_N):
            occupied = self._maps[table].occupied()
            row_N = occupied[draw_N % len(occupied)] if len(occupied) else row_N
        drawn, place_N = row_N.unique(return_inverse=True)
        return _Assigned(self._maps[table].rows(id_U), drawn, place_N)

    def _with_rows(self, part: Batch, item: "_Assigned | None") -> Batch:
        """The batch with rows wherever it held ids of the item table."""
        if item is None:
            return part
        history = item.row_U[part.history[self._item_feature]]
        candidate = part.candidate.get(self._item_feature)
        return dataclasses.replace(
            part,
            history_item_T=history,
            candidate_item_C=part.candidate_item_C if candidate is None else item.row_U[candidate],
            next_item=None if part.next_item is None else item.next_item(part.next_item, history),
        )


@dataclasses.dataclass(frozen=True)
class _Assigned:
    """Rows of one table."""

    row_U: torch.Tensor
    drawn: torch.Tensor
    """Distinct rows of the draws."""
    place_N: torch.Tensor
    """Draw -> its place in `drawn`."""

    def next_item(self, wanted: NextItem, history_item_T: torch.Tensor) -> NextItem:
        """Targets and negatives as rows. A target without a row of its own is none: it is not predicted."""
        item_M = history_item_T[wanted.target_token_M]
        keep = item_M != UNKNOWN_INDEX
        place_GN = self.place_N[wanted.negative_row_GN - len(self.row_U)]
        cuts, is_per_position = wanted.group_offsets, wanted.group_offsets is None
        if cuts is not None:
            kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
            cuts = tuple(kept_before[list(cuts)].tolist())
        if is_per_position:
            place_GN = place_GN[keep]
        return NextItem(
            token_M=wanted.token_M[keep],
            target_token_M=wanted.target_token_M[keep],
            item_M=item_M[keep],
            group_offsets=cuts,
            negative_item_GN=self.drawn[place_GN],
            negative_row_GN=len(self.row_U) + place_GN,
        )
