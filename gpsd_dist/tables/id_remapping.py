"""Remaps the raw ids of managed tables to rows just before the lookup; training also admits and evicts ids.

Every rank holds the same map of a table, because every rank updates it with the ids of all ranks.

Shape letters: U distinct ids of a rank's batch, A those of all ranks (with repeats), N draws, M next-item positions.
"""

import dataclasses
import re
import typing

import torch

from gpsd_dist.batch.batch import Batch, NextItem
from gpsd_dist.batch.lookup import lookup_of
from gpsd_dist.distributed.collectives import all_gather_rows
from gpsd_dist.schema import UNKNOWN_INDEX, Manifest
from gpsd_dist.tables.managed_collision import ManagedCollisionMap

Reset: typing.TypeAlias = typing.Callable[[torch.Tensor, int], None]
"""Takes (rows that got a new id, number of the update); gives these rows new weights and no optimizer state."""


class IdRemapper:
    """Remaps ids for the managed tables of a run; without such tables it returns batches as they are."""

    def __init__(self, manifest: Manifest, maps: dict[str, ManagedCollisionMap], resets: typing.Mapping[str, Reset]):
        """`resets` has an entry for each trained table; the map of a frozen table never changes."""
        item = manifest.feature(manifest.item_feature)
        self._item_feature, self._item_table = item.name, item.table
        self._maps, self._resets = maps, resets
        self.metrics: dict[str, float] = {}
        """Those of the last `train`, over all ranks.

        `ids/<table>_rows_used`: share of the rows that belong to an id. `ids/<table>_changed_rows`: rows reset.
        `ids/<table>_unknown`: share of the occurrences that read the unknown row.
        """

    def train(self, batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        """Counts, admits and evicts ids, then remaps a batch (its micro-batches). Collective: all ranks must call."""
        first = batches[0]
        for table in first.raw_ids:  # in the order of the sparse features, which is the same on every rank
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
        """Remaps ids by the maps as they are; an id without a row of its own reads the unknown row."""
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
        """Returns the rows that belong to an id, ascending; None for a table that is not managed: all rows do."""
        return self._maps[table].occupied().to(device) if table in self._maps else None

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Returns table -> live tensors of its map, for checkpoints; the same on every rank."""
        return {table: managed.state() for table, managed in self._maps.items()}

    def _measure(self, table: str, changed: torch.Tensor, distinct: torch.Tensor, counts: torch.Tensor) -> None:
        managed, name = self._maps[table], re.sub("[^A-Za-z0-9_]", "_", table)
        unknown = counts[managed.rows(distinct) == UNKNOWN_INDEX].sum() / counts.sum().clamp(min=1)
        self.metrics[f"ids/{name}_rows_used"] = managed.share_used()
        self.metrics[f"ids/{name}_changed_rows"] = float(len(changed))
        self.metrics[f"ids/{name}_unknown"] = float(unknown)

    def _section(self, batch: Batch, table: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits a table's sparse features into distinct ids [U] and random draws of negatives [N]."""
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
        """Replaces the ids of the item table by rows, wherever the batch holds them."""
        if item is None:
            return part
        candidate, padded = part.candidate.get(self._item_feature), part.padded
        return dataclasses.replace(
            part,
            history_item_T=item.row_U[part.history[self._item_feature]],
            candidate_item_C=part.candidate_item_C if candidate is None else item.row_U[candidate],
            next_item=None if part.next_item is None else item.next_item(part.next_item, self._item_feature),
            # They say where the targets were that are dropped now.
            padded=None if padded is None else dataclasses.replace(padded, targets=None),
        )


@dataclasses.dataclass(frozen=True)
class _Assigned:
    """Holds the rows of one table's distinct ids, and of the draws of negatives."""

    row_U: torch.Tensor
    drawn: torch.Tensor  # Distinct rows that were drawn
    place_N: torch.Tensor  # Index into `drawn` of every draw

    def next_item(self, wanted: NextItem, item_feature: str) -> NextItem:
        """Remaps targets and negatives. A target without a row of its own is dropped: nothing could predict it."""
        item_M = self.row_U[wanted.target[item_feature]]
        keep = item_M != UNKNOWN_INDEX
        place_GN = self.place_N[wanted.negative_row_GN - len(self.row_U)]
        cuts = wanted.group_offsets
        if cuts is None:  # every position has negatives of its own
            place_GN = place_GN[keep]
        else:
            kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
            cuts = tuple(kept_before[list(cuts)].tolist())
        return NextItem(
            token_M=wanted.token_M[keep],
            target={name: value_M[keep] for name, value_M in wanted.target.items()},
            item_M=item_M[keep],
            group_offsets=cuts,
            negative_item_GN=self.drawn[place_GN],
            negative_row_GN=len(self.row_U) + place_GN,
        )
