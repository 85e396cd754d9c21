"""Generative pretraining: every history token predicts the next item, and attributes of it. arXiv:2506.03699, 3.2.

It is judged by ranking all items at the end of a history (`item_ranking.py`).
Shape letters: T history tokens, M next-item positions, G sets of negatives, N negatives per set, E embedding width.
"""

import logging
import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import RunConfig
from gpsd_dist.data.item_events import ItemEvents, read_item_events
from gpsd_dist.data.item_offsets import ItemOffsets, Moments
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.metrics.ranking import MEAN_KEYS
from gpsd_dist.model.gpsd import NextItemModel, NextItemOutputs
from gpsd_dist.model.item_score import window_weights
from gpsd_dist.schema import Manifest, Table
from gpsd_dist.stages import losses
from gpsd_dist.stages.item_ranking import Scoring, rank_next_items
from gpsd_dist.stages.stage import Components, Metrics, check_best_metric

log = logging.getLogger(__name__)


class Pretrain:
    """Minimises sampled softmax over items, and full softmax over each auxiliary feature of the next item."""

    with_candidates: typing.ClassVar[bool] = False
    scored_losses: tuple[str, ...] = ()
    """None: validation ranks items, which is another quantity than the training loss."""

    def __init__(self, run: RunConfig, manifest: Manifest):
        self.run, self.config, self.manifest = run, run.pretrain, manifest
        check_best_metric(run, [f"next_item/{key}" for key in MEAN_KEYS])
        auxiliary = {f"next_{name}": self.config.auxiliary_weight for name in self.config.auxiliary}
        self.loss_weights = {"next_item": 1.0} | auxiliary
        self.has_offsets = self.config.item_bias or bool(self.config.recent_days)
        self._events: ItemEvents | None = None

    def model(self, sharded: tuple[Table, ...]) -> nn.Module:
        """Builds the tower with a projection to the width of the item table, which is also the output layer."""
        config = self.config
        return NextItemModel(
            self.manifest,
            self.run.tables,
            self.run.model,
            sharded,
            config.auxiliary,
            item_bias=config.item_bias,
            num_windows=len(config.recent_days),
        )

    def counts(self, batch: Batch) -> torch.Tensor:
        """Counts the positions with a next item, for every loss: float32 [L]."""
        token_M = batch.next_item.token_M
        # One count serves all losses: an auxiliary feature whose value is unknown is predicted as such.
        return torch.full((len(self.loss_weights),), float(len(token_M)), device=token_M.device)

    def loss_sums(self, model: nn.Module, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Sums the loss of the next item and of each auxiliary feature over the batch: float32 [L]."""
        outputs, next_item = model(embeddings, batch), batch.next_item
        # Only states that have a next item go on: the causal tower saw nothing behind its token, so the target cannot
        # leak into the state that predicts it.
        hidden_ME = outputs.hidden_TE.index_select(0, next_item.token_M)
        item = self.manifest.feature(self.manifest.item_feature)
        draws = (
            hidden_ME,
            # Input and output embeddings are one table: it is what the next stage takes over and may freeze.
            embeddings[item.table],
            next_item.target[item.name],
            next_item.item_M,
            next_item.negative_row_GN,
            next_item.negative_item_GN,
            next_item.group_offsets,
            self.config.temperature,
        )
        if self.has_offsets or next_item.negative_log_q_GN is not None:
            sums = [losses.offset_softmax(*draws, *self._offsets(outputs, hidden_ME, batch))]
        else:
            rounds = self.run.execution.matmul_dtype == "bf16" and not hidden_ME.is_cuda
            sums = [losses.sampled_softmax(*draws, rounds_operands=rounds)]
        for name in self.config.auxiliary:
            # The table is small enough to compete whole, and is the tower's input table too, as with the items.
            weight, target_M = outputs.auxiliary_weight[name], next_item.target[name]
            sums.append(losses.full_softmax(hidden_ME, weight, target_M, self.config.temperature))
        return torch.stack(sums)

    def _offsets(
        self, outputs: NextItemOutputs, hidden_ME: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, typing.Callable[[slice, torch.Tensor, int | slice], torch.Tensor]]:
        """Gives what is added to the logits of targets [M], and a function for those of negatives."""
        next_item = batch.next_item
        offsets = self._item_offsets(outputs.bias_V, next_item.item_M.device)
        temperature, log_q_GN = self.config.temperature, next_item.negative_log_q_GN
        at = Moments(next_item.item_M, None)
        if outputs.weight_WF is not None:
            time_s_M = next_item.time_s_M
            unit_ME, last_s_M = losses.unit(hidden_ME), batch.history_time_s_T[next_item.token_M]
            at = Moments(time_s_M, window_weights(outputs.weight_WF, unit_ME, last_s_M, time_s_M))

        def of_negatives(part: slice, item: torch.Tensor, group: int | slice) -> torch.Tensor:
            here = Moments(*(None if entry is None else entry[part] for entry in at))
            added = (offsets.of_all if item.ndim == 1 else offsets.of_own)(item, here) / temperature
            return added if log_q_GN is None else added - log_q_GN[group]

        return offsets.of_own(next_item.item_M, at) / temperature, of_negatives

    def _item_offsets(self, bias_V: torch.Tensor | None, device: torch.device) -> ItemOffsets:
        """Joins what is learnt to the events of the data set, which are read once.

        They are those of all splits, as a running counter has them: an event of `test` counts for what comes after.
        """
        days = self.config.recent_days
        if days and self._events is None:
            splits = [split.name for split in self.manifest.splits]
            found, num_untimed = read_item_events(self.run.data_dir, self.manifest, splits)
            if num_untimed:
                log.warning("%d tokens of the histories have no time; recent_days counts without them", num_untimed)
            self._events = found.to(device)
        return ItemOffsets(bias_V, days, self._events)

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
        scoring = None
        if self.has_offsets:
            learnt = typing.cast(NextItemModel, components.model).item_score
            assert learnt is not None
            bias_V, weight_WF = (None if part is None else part.double() for part in learnt.whole())
            offsets = self._item_offsets(bias_V, components.runtime.device)
            scoring = Scoring(offsets, weight_WF)
        return {"next_item": rank_next_items(components, self.manifest, batches, rank_cut, scoring)}

    def default_metric(self, metrics: Metrics) -> str:
        """Chooses the best checkpoint by mean reciprocal rank."""
        return "next_item/mrr"
