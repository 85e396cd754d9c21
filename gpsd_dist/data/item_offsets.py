"""Computes what is added to an item's cosine: a learnt bias, and learnt weights of its recent counts.

Training, `evaluate` and an index (`serving/retriever.py`) score with this one class.

Shape letters: V rows of the item table, W windows, R items, B moments, K items of a moment.
"""

import collections.abc
import dataclasses
import typing

import torch

from gpsd_dist.data.item_events import ItemEvents, window_seconds


class Moments(typing.NamedTuple):
    """Says when items are scored, and what the windows before weigh there."""

    time_s_B: torch.Tensor  # int64
    weight_BW: torch.Tensor | None  # None where there is no window


@dataclasses.dataclass(frozen=True)
class ItemOffsets:
    """Adds bias + sum over windows of weight x log(1 + count), in the unit of cosines, as exact as the weights are."""

    bias_V: torch.Tensor | None
    recent_days: tuple[float, ...]  # W windows
    events: ItemEvents | None  # None where there is no window

    def of_own(self, item: torch.Tensor, at: Moments) -> torch.Tensor:
        """Computes it for the own item of each moment [B], or for several [B, K]."""
        index = (slice(None),) if item.ndim == 1 else (slice(None), None)
        return self._sum(item, at, index, lambda events, window: events.count(item, at.time_s_B[index], window))

    def of_all(self, item_R: torch.Tensor, at: Moments) -> torch.Tensor:
        """Computes it for every item at every moment: [B, R], or [1, R] where no moment matters."""
        index = (slice(None), None)
        return self._sum(item_R[None], at, index, lambda events, window: events.count_all(item_R, at.time_s_B, window))

    def _sum(
        self,
        item: torch.Tensor,
        at: Moments,
        index: tuple[slice | None, ...],
        count: collections.abc.Callable[[ItemEvents, int], torch.Tensor],
    ) -> torch.Tensor:
        total = torch.zeros((), device=item.device) if self.bias_V is None else self.bias_V[item]
        if self.events is not None and at.weight_BW is not None:
            for weight_B, days in zip(at.weight_BW.unbind(1), self.recent_days, strict=True):
                # Added in one order, whatever the shape, so that equal items tie to the last bit. Logarithms are looked
                # up: there are few different counts, and many items.
                logs_N = self.events.logs.to(weight_B.dtype)
                total = total + weight_B[index] * logs_N[count(self.events, window_seconds(days))]
        return total
