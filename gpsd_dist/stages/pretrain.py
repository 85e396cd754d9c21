"""Generative pretraining: every history token predicts the next item, and attributes of it. arXiv:2506.03699, 3.2.

It is judged by ranking all items at the end of a history (`item_ranking.py`).
Shape letters: T history tokens, M next-item positions, G sets of negatives, N negatives per set, E embedding width.
"""

import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch, NextItem
from gpsd_dist.config import RunConfig
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.metrics.ranking import MEAN_KEYS
from gpsd_dist.model.gpsd import NextItemModel, NextItemOutputs
from gpsd_dist.schema import Manifest, Table
from gpsd_dist.stages import captured, losses
from gpsd_dist.stages.item_ranking import rank_next_items
from gpsd_dist.stages.item_score import ItemScores
from gpsd_dist.stages.stage import Components, Metrics, check_best_metric


class Pretrain:
    """Minimises sampled softmax over items, and full softmax over each auxiliary feature of the next item."""

    with_candidates: typing.ClassVar[bool] = False
    scored_losses: tuple[str, ...] = ()
    """None: validation ranks items, which is another quantity than the training loss."""

    def __init__(self, run: RunConfig, manifest: Manifest):
        self.run, self.config, self.manifest = run, run.pretrain, manifest
        self._item = manifest.feature(manifest.item_feature)
        check_best_metric(run, [f"next_item/{key}" for key in MEAN_KEYS])
        auxiliary = {f"next_{name}": self.config.auxiliary_weight for name in self.config.auxiliary}
        self.loss_weights = {"next_item": 1.0} | auxiliary
        self.scores = ItemScores(run, manifest)

    def model(self, sharded: tuple[Table, ...]) -> nn.Module:
        """Builds the tower with a projection to the width of the item table, which is also the output layer."""
        config, extra = self.config, (self.config.item_bias, len(self.config.recent_days))
        return NextItemModel(self.manifest, self.run.tables, self.run.model, sharded, config.auxiliary, *extra)

    def counts(self, batch: Batch) -> torch.Tensor:
        """Counts the positions with a next item, for every loss: float32 [L]."""
        token_M = batch.next_item.token_M
        # One count serves all losses: an auxiliary feature whose value is unknown is predicted as such.
        return torch.full((len(self.loss_weights),), float(len(token_M)), device=token_M.device)

    def loss_sums(self, model: nn.Module, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Sums the loss of the next item and of each auxiliary feature over the batch: float32 [L]."""
        if self.run.execution.cuda_graphs and captured.fits(batch) and not self.scores.changes_the_loss:
            return model(embeddings, batch, instead=captured.next_item_sums, item=self._item, sums=self._sums)
        return self._sums(model(embeddings, batch), embeddings[self._item.table], batch.next_item, batch)

    def _sums(self, outputs: NextItemOutputs, rows_UE: torch.Tensor, next_item: NextItem, batch=None) -> torch.Tensor:
        # Only states that have a next item go on: the causal tower saw nothing behind its token, so the target cannot
        # leak into the state that predicts it.
        hidden_ME = outputs.hidden_TE.index_select(0, next_item.token_M)
        draws = (
            hidden_ME,
            # Input and output embeddings are one table: it is what the next stage takes over and may freeze.
            rows_UE,
            next_item.target[self._item.name],
            next_item.item_M,
            next_item.negative_row_GN,
            next_item.negative_item_GN,
            next_item.group_offsets,
            self.config.temperature,
        )
        rounds = self.run.execution.matmul_dtype == "bf16" and not hidden_ME.is_cuda
        if self.scores.changes_the_loss:
            sums = [self.scores.loss(draws, outputs, batch)]
        else:
            sums = [losses.sampled_softmax(*draws, is_real_M=next_item.is_real_M, rounds_operands=rounds)]
        for name in self.config.auxiliary:
            # The table is small enough to compete whole, and is the tower's input table too, as with the items.
            weight, target_M = outputs.auxiliary_weight[name], next_item.target[name]
            sums.append(losses.full_softmax(hidden_ME, weight, target_M, self.config.temperature))
        return torch.stack(sums)

    def evaluate(
        self,
        components: Components,
        batches: typing.Iterable[tuple[Batch, ...]],
        rank_cut: int | None,
        keep: dict[str, Predictions] | None = None,
    ) -> Metrics:
        """Ranks all items at the end of each history: task "next_item" -> HR@K, NDCG@K, MRR, rows. Collective."""
        if keep is not None:
            raise ValueError(
                "a pretrained run ranks items and scores no candidates: leave out --scores_out and --min_item_count"
            )
        scoring = self.scores.scoring(components)
        return {"next_item": rank_next_items(components, self.manifest, batches, rank_cut, scoring)}

    def default_metric(self, metrics: Metrics) -> str:
        """Chooses the best checkpoint by mean reciprocal rank."""
        return "next_item/mrr"
