"""Generative pretraining: every history token predicts the next item, and attributes of it. arXiv:2506.03699, 3.2.

It is judged by ranking all items at the end of a history. Shape letters: T history tokens, M next-item positions,
G negative groups, N negatives per group, E embedding width, B requests, P positive candidates, R items of this rank.
"""

import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import RunConfig
from gpsd_dist.metrics.ranking import RankingSums
from gpsd_dist.model.gpsd import NextItemModel
from gpsd_dist.schema import Manifest, Table
from gpsd_dist.stages import item_ranking, losses
from gpsd_dist.stages.stage import Components, Metrics


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
        first, block_RE = item_ranking.item_block(components, item.table, num_rows)
        exists_R = item_ranking.existing(components, item.table, first, len(block_RE))
        sums = RankingSums(runtime.device)
        for (host_batch,) in batches:
            runtime.watchdog.alive()
            (batch,) = components.ids.assign((host_batch.to(runtime.device),))
            embeddings = components.tables(batch.lookup)
            query_BE = item_ranking.last_states(components, embeddings, batch, block_RE.shape[1])
            is_positive_C = batch.labels[manifest.tasks[0].name] == 1
            request_P = batch.packing.request_C[is_positive_C]
            target_P = batch.candidate_item_C[is_positive_C]
            excluded = item_ranking.own_history(batch, request_P)
            ranks_P = item_ranking.ranks_over_all(
                query_BE[request_P], target_P, excluded, block_RE, exists_R, first, num_rows, runtime.rank, rank_cut
            )
            sums.update(ranks_P, target_P)
        sums.reduce()
        return {"next_item": sums.metrics()}

    def default_metric(self, metrics: Metrics) -> str:
        """Mean reciprocal rank."""
        return "next_item/mrr"
