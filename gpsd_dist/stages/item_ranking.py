"""Ranks all items by the last state of a history, with the items spread over the ranks. Used by `pretrain.py`.

Shape letters: B requests, E embedding width, P positive candidates, R items of this rank, A positives of all ranks.
"""

import itertools

import torch
import torch.nn.functional as F

from gpsd_dist.batch.batch import Batch, lookup_of
from gpsd_dist.distributed.collectives import all_gather_rows, all_sum
from gpsd_dist.metrics.ranking import Excluded, rank_targets
from gpsd_dist.stages.stage import Components

_LOOKUP_CHUNK_ROWS = 65_536


def last_states(components: Components, embeddings: dict[str, torch.Tensor], batch: Batch, width: int) -> torch.Tensor:
    """Unit state [B, E] at the last history token; zeros (ranks its target last) for an empty history."""
    query_BE = torch.zeros(batch.num_requests, width, device=batch.history_item_T.device)
    if len(batch.history_item_T) or components.forward_is_collective:
        offsets = batch.packing.history_offsets
        has_history = offsets.diff() > 0
        hidden_TE = F.normalize(components.model(embeddings, batch).hidden_TE, dim=-1)
        query_BE[has_history] = hidden_TE[offsets[1:][has_history] - 1]
    return query_BE


def item_block(components: Components, table: str, num_rows: int) -> tuple[int, torch.Tensor]:
    """Looks up this rank's part of the item table, which is right for any sharding: (first row, unit rows [R, E])."""
    runtime, names = components.runtime, components.lookup_names
    cuts = [num_rows * rank // runtime.world_size for rank in range(runtime.world_size + 1)]
    largest = max(stop - start for start, stop in itertools.pairwise(cuts))
    first, stop = cuts[runtime.rank], cuts[runtime.rank + 1]
    parts = []
    for offset in range(0, largest, _LOOKUP_CHUNK_ROWS):  # the same number of lookups on every rank
        index = torch.arange(min(first + offset, stop), min(first + offset + _LOOKUP_CHUNK_ROWS, stop))
        sizes = [len(index) if name == table else 0 for name in names]
        lookup = lookup_of(names, index.to(runtime.device), sizes)
        parts.append(F.normalize(components.tables(lookup)[table].float(), dim=-1))
    return first, torch.cat(parts)


def existing(components: Components, table: str, first: int, num_rows: int) -> torch.Tensor | None:
    """Tells which of this rank's rows belong to an item: bool [R]; None if all do. A managed table has empty rows."""
    device = components.runtime.device
    occupied = components.ids.occupied(table, device)
    return None if occupied is None else torch.isin(first + torch.arange(num_rows, device=device), occupied)


def own_history(batch: Batch, request_P: torch.Tensor) -> Excluded:
    """The history of each positive's request; requests with several positives contribute once for each."""
    offsets = batch.packing.history_offsets
    length_P = offsets.diff()[request_P]
    query_N = torch.repeat_interleave(length_P)
    nth_N = torch.arange(len(query_N), device=query_N.device) - (length_P.cumsum(0) - length_P)[query_N]
    return Excluded(batch.history_item_T[offsets[request_P][query_N] + nth_N], query_N)


def ranks_over_all(
    query_PE: torch.Tensor,
    target_P: torch.Tensor,
    excluded: Excluded,
    block_RE: torch.Tensor,
    exists_R: torch.Tensor | None,
    first: int,
    num_rows: int,
    rank: int,
    rank_cut: int | None,
) -> torch.Tensor:
    """Ranks [P] of this rank's targets: queries travel to every rank, counts of better items are summed back."""
    targets = all_gather_rows(target_P)
    start = sum(len(part) for part in targets[:rank])
    rank_A = rank_targets(
        torch.cat(all_gather_rows(query_PE)),
        block_RE,
        torch.cat(targets),
        first_row=first,
        num_items=num_rows,
        excluded=Excluded(
            torch.cat(all_gather_rows(excluded.item_N)), torch.cat(all_gather_rows(excluded.query_N + start))
        ),
        exists_R=exists_R,
        rank_cut=rank_cut,
        sum_over_blocks=all_sum,
    )
    return rank_A[start : start + len(target_P)]
