"""Generative pretraining: every history token predicts the next item, and attributes of it. arXiv:2506.03699, 3.2.

It is judged by ranking all items at the end of a history. Shape letters: T history tokens, M next-item positions,
G negative groups, N negatives per group, E embedding width, B requests, P positive candidates, R items of this rank.
"""

import itertools
import typing

import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.batch.batch import Batch, lookup_of
from gpsd_dist.config import RunConfig
from gpsd_dist.distributed.collectives import all_gather_rows, all_sum
from gpsd_dist.metrics.ranking import Excluded, RankingSums, rank_targets
from gpsd_dist.model.gpsd import NextItemModel
from gpsd_dist.schema import Manifest, Table
from gpsd_dist.stages import losses
from gpsd_dist.stages.stage import Components, Metrics

_LOOKUP_CHUNK_ROWS = 65_536


class Pretrain:
    """Sampled softmax over items, and full softmax over each auxiliary feature of the next item."""

    with_candidates: typing.ClassVar[bool] = False

    def __init__(self, run: RunConfig, manifest: Manifest):
        self.run, self.config, self.manifest = run, run.pretrain, manifest

    @property
    def loss_weights(self) -> dict[str, float]:
        """`next_item` weighs 1, `next_<feature>` the auxiliary weight."""
        return {"next_item": 1.0} | {f"next_{name}": self.config.auxiliary_weight for name in self.config.auxiliary}

    @property
    def scored_losses(self) -> tuple[str, ...]:
        """None: validation ranks items, which is another quantity than the training loss."""
        return ()

    def model(self, sharded: tuple[Table, ...]) -> nn.Module:
        """Builds the tower with a projection to the width of the item table, which is also the output layer."""
        return NextItemModel(self.manifest, self.run.tables, self.run.model, sharded, self.config.auxiliary)

    def counts(self, batch: Batch) -> torch.Tensor:
        """Counts the positions with a next item, for every loss: float32 [L]."""
        token_M = batch.next_item.token_M
        return torch.full((len(self.loss_weights),), float(len(token_M)), device=token_M.device)

    def loss_sums(self, model: nn.Module, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Sums the loss of the next item and of each auxiliary feature over the batch: float32 [L]."""
        outputs, next_item = model(embeddings, batch), batch.next_item
        hidden_ME = outputs.hidden_TE.index_select(0, next_item.token_M)
        item = self.manifest.feature(self.manifest.item_feature)
        sums = [
            losses.sampled_softmax(
                hidden_ME,
                embeddings[item.table],
                batch.history[item.name][next_item.target_token_M],
                next_item.item_M,
                next_item.negative_row_GN,
                next_item.negative_item_GN,
                next_item.group_offsets,
                self.config.temperature,
            )
        ]
        for name in self.config.auxiliary:
            target_M = batch.history[name][next_item.target_token_M]
            sums.append(
                losses.full_softmax(hidden_ME, outputs.auxiliary_weight[name], target_M, self.config.temperature)
            )
        return torch.stack(sums)

    def evaluate(
        self, components: Components, batches: typing.Iterable[tuple[Batch, ...]], rank_cut: int | None
    ) -> Metrics:
        """Ranks every item that is not in the (visible) history by the last history state of each request. Collective.

        Targets are the positive candidates of the first task. Each rank scores its part of the items for the queries
        of all ranks. A target beyond `rank_cut` has rank `rank_cut` + 1 (see `metrics.ranking.RANK_CUT`).
        """
        runtime, manifest = components.runtime, self.manifest
        item = manifest.feature(manifest.item_feature)
        num_rows = manifest.table(item.table).num_rows
        first, block_RE = _item_block(components, item.table, num_rows)
        occupied = components.ids.occupied(item.table, runtime.device)
        exists_R = None
        if occupied is not None:
            exists_R = torch.isin(first + torch.arange(len(block_RE), device=runtime.device), occupied)
        sums = RankingSums(runtime.device)
        for (host_batch,) in batches:
            runtime.watchdog.alive()
            (batch,) = components.ids.assign((host_batch.to(runtime.device),))
            embeddings = components.tables(batch.lookup)
            query_BE = _last_states(components, embeddings, batch, block_RE.shape[1])
            is_positive_C = batch.labels[manifest.tasks[0].name] == 1
            request_P = batch.packing.request_C[is_positive_C]
            target_P = batch.candidate_item_C[is_positive_C]
            excluded = _own_history(batch, request_P)
            ranks_P = _ranks_over_all(
                query_BE[request_P], target_P, excluded, block_RE, exists_R, first, num_rows, runtime.rank, rank_cut
            )
            sums.update(ranks_P, target_P)
        sums.reduce()
        return {"next_item": sums.metrics()}

    def default_metric(self, metrics: Metrics) -> str:
        """Mean reciprocal rank."""
        return "next_item/mrr"


def _last_states(components: Components, embeddings: dict[str, torch.Tensor], batch: Batch, width: int) -> torch.Tensor:
    """Unit state [B, E] at the last history token; zeros (ranks its target last) for an empty history."""
    query_BE = torch.zeros(batch.num_requests, width, device=batch.history_item_T.device)
    if len(batch.history_item_T) or components.forward_is_collective:
        offsets = batch.packing.history_offsets
        has_history = offsets.diff() > 0
        hidden_TE = F.normalize(components.model(embeddings, batch).hidden_TE, dim=-1)
        query_BE[has_history] = hidden_TE[offsets[1:][has_history] - 1]
    return query_BE


def _item_block(components: Components, table: str, num_rows: int) -> tuple[int, torch.Tensor]:
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


def _own_history(batch: Batch, request_P: torch.Tensor) -> Excluded:
    """The history of each positive's request; requests with several positives contribute once for each."""
    offsets = batch.packing.history_offsets
    length_P = offsets.diff()[request_P]
    query_N = torch.repeat_interleave(length_P)
    nth_N = torch.arange(len(query_N), device=query_N.device) - (length_P.cumsum(0) - length_P)[query_N]
    return Excluded(batch.history_item_T[offsets[request_P][query_N] + nth_N], query_N)


def _ranks_over_all(
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
