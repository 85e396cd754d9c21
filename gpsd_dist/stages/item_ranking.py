"""Ranks every item for the end of each history: validation of pretraining. The items are divided among the ranks.

Shape letters: B requests, T history tokens, C candidates, P positive candidates of this rank, A those of all ranks,
N excluded pairs, R items of this rank, E embedding width.
"""

import itertools
import typing

import torch

from gpsd_dist.batch.batch import Batch
from gpsd_dist.batch.lookup import lookup_of
from gpsd_dist.data.item_offsets import ItemOffsets, Moments
from gpsd_dist.distributed.collectives import all_gather_rows, all_sum
from gpsd_dist.metrics.ranking import Excluded, Offsets, RankingSums, rank_targets
from gpsd_dist.model.item_score import window_weights
from gpsd_dist.schema import Manifest
from gpsd_dist.stages import losses
from gpsd_dist.stages.stage import Components

_LOOKUP_CHUNK_ROWS = 65_536  # bounds what one lookup exchanges; untuned


class _Items(typing.NamedTuple):
    """This rank's block of the item table."""

    first_row: int
    unit_RE: torch.Tensor
    exists_R: torch.Tensor | None  # bool: rows that belong to an item; None: all that are not reserved
    num_rows: int  # Rows of the whole table


class Scoring(typing.NamedTuple):
    """Says what is added to cosines."""

    offsets: ItemOffsets  # in float64
    weight_WF: torch.Tensor | None  # of windows: `item_score.window_weights`


def rank_next_items(
    components: Components,
    manifest: Manifest,
    batches: typing.Iterable[tuple[Batch, ...]],
    rank_cut: int | None,
    scoring: Scoring | None = None,
) -> dict[str, float | int]:
    """Ranks all items by the last history state of each request: HR@K, NDCG@K and MRR over all ranks. Collective.

    Items of the (visible) history are left out; the positive candidates of the first task are the targets. A target
    beyond `rank_cut` has rank `rank_cut` + 1 (see `metrics.ranking.RANK_CUT`).
    """
    runtime = components.runtime
    items = _item_block(components, manifest)
    sums = RankingSums(runtime.device)
    for (host_batch,) in batches:
        runtime.watchdog.alive()
        (batch,) = components.ids.assign((host_batch.to(runtime.device),))
        embeddings = components.tables(batch.lookup)
        query_BE = _last_states(components, embeddings, batch, items.unit_RE.shape[1])
        is_positive_C = batch.labels[manifest.tasks[0].name] == 1
        request_P = batch.packing.request_C[is_positive_C]
        target_P = batch.candidate_item_C[is_positive_C]
        excluded = _own_history(batch, request_P)
        queries = _Queries(query_BE[request_P], target_P, _last_times(batch, request_P), excluded)
        ranks_P = _ranks_over_all(queries, items, runtime.rank, rank_cut, scoring)
        sums.update(ranks_P, target_P)
    sums.reduce()
    return sums.metrics()


def _last_states(components: Components, embeddings: dict[str, torch.Tensor], batch: Batch, width: int) -> torch.Tensor:
    """Gives the unit state [B, E] at the last history token; zeros (ranks its target last) for an empty history."""
    query_BE = torch.zeros(batch.packing.num_requests, width, device=batch.history_item_T.device)
    if len(batch.history_item_T) or components.forward_is_collective:
        offsets = batch.packing.history_offsets
        has_history = offsets.diff() > 0
        hidden_TE = losses.unit(components.model(embeddings, batch).hidden_TE)
        query_BE[has_history] = hidden_TE[offsets[1:][has_history] - 1]
    return query_BE


def _item_block(components: Components, manifest: Manifest) -> _Items:
    """Looks up this rank's part of the item table, through TorchRec: right for any sharding. Collective."""
    runtime, names = components.runtime, components.lookup_names
    table = manifest.feature(manifest.item_feature).table
    num_rows = manifest.table(table).num_rows
    cuts = [num_rows * rank // runtime.world_size for rank in range(runtime.world_size + 1)]
    largest = max(stop - start for start, stop in itertools.pairwise(cuts))
    first, stop = cuts[runtime.rank], cuts[runtime.rank + 1]
    blocks = []
    # Up to the largest part of all ranks: a lookup is collective, so every rank makes as many.
    for offset in range(0, largest, _LOOKUP_CHUNK_ROWS):
        index = torch.arange(min(first + offset, stop), min(first + offset + _LOOKUP_CHUNK_ROWS, stop))
        sizes = [len(index) if name == table else 0 for name in names]
        lookup = lookup_of(names, index.to(runtime.device), sizes)
        blocks.append(losses.unit(components.tables(lookup)[table]))
    unit_RE = torch.cat(blocks)
    occupied = components.ids.occupied(table, runtime.device)
    exists_R = None
    if occupied is not None:
        exists_R = torch.isin(first + torch.arange(len(unit_RE), device=runtime.device), occupied)
    return _Items(first, unit_RE, exists_R, num_rows)


def _own_history(batch: Batch, request_P: torch.Tensor) -> Excluded:
    """Lists the history of each positive's request; requests with several positives contribute once for each."""
    offsets = batch.packing.history_offsets
    length_P = offsets.diff()[request_P]
    query_N = torch.repeat_interleave(length_P)
    nth_N = torch.arange(len(query_N), device=query_N.device) - (length_P.cumsum(0) - length_P)[query_N]
    return Excluded(batch.history_item_T[offsets[request_P][query_N] + nth_N], query_N)


class _Queries(typing.NamedTuple):
    """This rank's queries."""

    vector_PE: torch.Tensor
    target_P: torch.Tensor
    times_P3: torch.Tensor
    """int64: 1 where there is a history (without one all items tie), the time of its last event, that of the request"""
    excluded: Excluded


def _last_times(batch: Batch, request_P: torch.Tensor) -> torch.Tensor:
    offsets, time_s_T = batch.packing.history_offsets, batch.history_time_s_T
    has_history_B = offsets.diff() > 0
    last_s_B = torch.full_like(batch.request_time_s_B, -1)
    last_s_B[has_history_B] = time_s_T[offsets[1:][has_history_B] - 1]
    return torch.stack((has_history_B.long(), last_s_B, batch.request_time_s_B), 1)[request_P]


def _ranks_over_all(
    queries: _Queries, items: _Items, rank: int, rank_cut: int | None, scoring: Scoring | None
) -> torch.Tensor:
    """Ranks [P] of this rank's targets: queries travel to every rank, counts of better items are summed back."""
    excluded, targets = queries.excluded, all_gather_rows(queries.target_P)
    start = sum(len(part) for part in targets[:rank])
    target_A, query_AE = torch.cat(targets), torch.cat(all_gather_rows(queries.vector_PE))
    rank_A = rank_targets(
        query_AE,
        items.unit_RE,
        target_A,
        first_row=items.first_row,
        num_items=items.num_rows,
        excluded=Excluded(
            torch.cat(all_gather_rows(excluded.item_N)), torch.cat(all_gather_rows(excluded.query_N + start))
        ),
        exists_R=items.exists_R,
        rank_cut=rank_cut,
        sum_over_blocks=all_sum,
        offsets=None if scoring is None else _offsets(queries, target_A, query_AE, scoring),
    )
    return rank_A[start : start + len(queries.target_P)]


def _offsets(queries: _Queries, target_A: torch.Tensor, query_AE: torch.Tensor, scoring: Scoring) -> Offsets:
    """Computes what is added to cosines; nothing for a query without a history. Collective."""
    has_history_A, last_s_A, time_s_A = torch.cat(all_gather_rows(queries.times_P3)).unbind(1)
    weight_WF, offsets = scoring.weight_WF, scoring.offsets
    weight_AW = None if weight_WF is None else window_weights(weight_WF, query_AE, last_s_A, time_s_A)
    at, share_A = Moments(time_s_A, weight_AW), has_history_A.double()

    def of_rows(first: int, stop: int) -> torch.Tensor:
        return share_A[:, None] * offsets.of_all(torch.arange(first, stop, device=target_A.device), at)

    return Offsets(share_A * offsets.of_own(target_A, at), of_rows)
