"""Trains and ranks with offsets of items (bias, recent counts) and corrected draws: options of PretrainConfig, all off.

Shape letters: M next-item positions, G sets of negatives, N negatives per set, U looked-up rows, E embedding width.
"""

import collections.abc
import itertools
import logging
import typing

import torch
from torch.utils.checkpoint import checkpoint

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import RunConfig
from gpsd_dist.data.item_events import ItemEvents, read_item_events
from gpsd_dist.data.item_offsets import ItemOffsets, Moments
from gpsd_dist.model.gpsd import NextItemModel, NextItemOutputs
from gpsd_dist.model.heads import unit
from gpsd_dist.model.item_score import window_weights
from gpsd_dist.schema import Manifest
from gpsd_dist.stages.item_ranking import Scoring
from gpsd_dist.stages.losses import CHUNK_ELEMENTS
from gpsd_dist.stages.stage import Components

log = logging.getLogger(__name__)
_NegativeOffset: typing.TypeAlias = collections.abc.Callable[[slice, torch.Tensor, int | slice], torch.Tensor]


class ItemScores:
    """Adds to cosines and corrects draws, as the options of a run say."""

    def __init__(self, run: RunConfig, manifest: Manifest):
        self._run, self._manifest, self._config = run, manifest, run.pretrain
        self.has_offsets = self._config.item_bias or bool(self._config.recent_days)
        self.changes_the_loss = self.has_offsets or self._config.log_q
        self._events: ItemEvents | None = None

    def loss(self, draws: tuple[typing.Any, ...], outputs: NextItemOutputs, batch: Batch) -> torch.Tensor:
        """Sums the next-item loss. `draws`: the arguments of `losses.sampled_softmax`."""
        target_offset_M, negative_offset = self._offsets(outputs, draws[0], batch)
        return offset_softmax(target_offset_M, negative_offset, *draws)

    def scoring(self, components: Components) -> Scoring | None:
        """Collects what `evaluate` adds to cosines; None where nothing is. Collective under FSDP2."""
        learnt = typing.cast(NextItemModel, components.model).item_score if self.has_offsets else None
        if learnt is None:
            return None
        bias_V, weight_WF = (None if part is None else part.double() for part in learnt.whole())
        return Scoring(self._item_offsets(bias_V, components.runtime.device), weight_WF)

    def _offsets(
        self, outputs: NextItemOutputs, hidden_ME: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, _NegativeOffset]:
        """Gives what is added to the logits of targets [M], and a function for those of negatives."""
        next_item, temperature = batch.next_item, self._config.temperature
        assert next_item is not None
        offsets = self._item_offsets(outputs.bias_V, next_item.item_M.device)
        log_q_GN, at = next_item.negative_log_q_GN, Moments(next_item.item_M, None)
        if outputs.weight_WF is not None:
            time_s_M = next_item.time_s_M
            assert time_s_M is not None
            unit_ME, last_s_M = unit(hidden_ME), batch.history_time_s_T[next_item.token_M]
            at = Moments(time_s_M, window_weights(outputs.weight_WF, unit_ME, last_s_M, time_s_M))

        def of_negatives(part: slice, item: torch.Tensor, group: int | slice) -> torch.Tensor:
            here = Moments(at.time_s_B[part], None if at.weight_BW is None else at.weight_BW[part])
            added = (offsets.of_all if item.ndim == 1 else offsets.of_own)(item, here) / temperature
            return added if log_q_GN is None else added - log_q_GN[group]

        return offsets.of_own(next_item.item_M, at) / temperature, of_negatives

    def _item_offsets(self, bias_V: torch.Tensor | None, device: torch.device) -> ItemOffsets:
        """Joins what is learnt to the events of the data set, which are read once.

        They are those of all splits, as a running counter has them: an event of `test` counts for what comes after.
        """
        days = self._config.recent_days
        if days and self._events is None:
            splits = [split.name for split in self._manifest.splits]
            found, num_untimed = read_item_events(self._run.data_dir, self._manifest, splits)
            if num_untimed:
                log.warning("%d tokens of the histories have no time; recent_days counts without them", num_untimed)
            self._events = found.to(device)
        return ItemOffsets(bias_V, days, self._events)


def offset_softmax(
    target_offset_M: torch.Tensor,
    negative_offset: _NegativeOffset,
    hidden_ME: torch.Tensor,
    rows_UE: torch.Tensor,
    target_row_M: torch.Tensor,
    target_item_M: torch.Tensor,
    negative_row_GN: torch.Tensor,
    negative_item_GN: torch.Tensor,
    group_offsets: tuple[int, ...] | None,
    temperature: float,
) -> torch.Tensor:
    """Sums the loss of `sampled_softmax` where something is added to each logit, whose gradients autograd computes.

    `negative_offset(positions, items, group)` gives what is added for some positions and the items of their group [N],
    or the own ones of each [m, N]: [m, N]. About 16 bytes per position and negative of a group are kept for the
    backward; parts of own ones are computed again there, because each keeps a row of E per negative.
    """
    with torch.autocast(hidden_ME.device.type, enabled=False):
        unit_UE, query_ME = unit(rows_UE), unit(hidden_ME) / temperature
        target_M = (query_ME * unit_UE.index_select(0, target_row_M)).sum(-1) + target_offset_M
        loss = target_M[:0].sum()  # a zero that every parameter takes part in: DDP waits for each of them

        def of_part(part: slice, group: int | slice) -> torch.Tensor:
            row, item = negative_row_GN[group], negative_item_GN[group]
            unit_of = unit_UE.index_select(0, row.flatten()).unflatten(0, row.shape)
            query_mE = query_ME[part]
            logits_mN = query_mE @ unit_of.t() if row.ndim == 1 else (unit_of @ query_mE[:, :, None]).squeeze(-1)
            logits_mN = logits_mN + negative_offset(part, item, group)
            logits_mN = logits_mN.masked_fill(target_item_M[part, None] == item, float("-inf"))
            target_m1 = target_M[part, None]
            return (torch.cat((target_m1, logits_mN), 1).logsumexp(1) - target_m1.squeeze(1)).sum()

        for part, group in _parts(group_offsets, negative_row_GN, unit_UE.shape[1]):
            if group_offsets is None:
                loss = loss + checkpoint(of_part, part, group, use_reentrant=False, preserve_rng_state=False)
            else:
                loss = loss + of_part(part, group)
        return loss


def _parts(
    group_offsets: tuple[int, ...] | None, negative_row_GN: torch.Tensor, width: int
) -> collections.abc.Iterator[tuple[slice, int | slice]]:
    """Cuts positions into those that are computed together, with the number of their set, or their own sets."""
    if group_offsets is not None:
        yield from ((slice(*cut), group) for group, cut in enumerate(itertools.pairwise(group_offsets)))
        return
    num_sets, num_negatives = negative_row_GN.shape
    size = max(1, CHUNK_ELEMENTS // (num_negatives * width))
    parts = (slice(start, min(start + size, num_sets)) for start in range(0, num_sets, size))
    yield from ((part, part) for part in parts)
