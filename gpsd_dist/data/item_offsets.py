"""Computes what is added to an item's cosine: a learnt bias, and learnt weights of its recent counts.

Training, `evaluate` and an index (`serving/retriever.py`) score with this one class.

Shape letters: V rows of the item table, W windows, P pairs of an item and a moment, R items, B moments.
"""

import collections.abc
import dataclasses

import torch

from gpsd_dist.data.item_events import ItemEvents, window_seconds


@dataclasses.dataclass(frozen=True)
class ItemOffsets:
    """Adds bias + sum over windows of weight x log(1 + count), in the unit of logits, as exact as the weights are."""

    bias_V: torch.Tensor | None
    weight_W: torch.Tensor | None
    recent_days: tuple[float, ...]  # W windows
    events: ItemEvents | None  # None where there is no window

    def of_pairs(self, item_P: torch.Tensor, time_s_P: torch.Tensor) -> torch.Tensor:
        """Computes it for pairs of an item and a moment; their shapes are broadcast."""
        return self._sum(item_P, lambda events, window: events.count(item_P, time_s_P, window))

    def of_all(self, item_R: torch.Tensor, time_s_B: torch.Tensor) -> torch.Tensor:
        """Computes it for every item at every moment: [B, R], or [1, R] where no moment matters."""
        return self._sum(item_R[None], lambda events, window: events.count_all(item_R, time_s_B, window))

    def bound(self) -> float:
        """Returns a number that no offset exceeds in size."""
        bias = 0.0 if self.bias_V is None else float(self.bias_V.abs().max())
        if self.events is None or self.weight_W is None:
            return bias
        return bias + float(self.weight_W.abs().sum()) * float(torch.tensor(float(len(self.events))).log1p())

    def double(self) -> "ItemOffsets":
        """Returns the same in float64, for scores that are rounded once, at the end."""
        bias_V, weight_W = (None if part is None else part.double() for part in (self.bias_V, self.weight_W))
        return ItemOffsets(bias_V, weight_W, self.recent_days, self.events)

    def _sum(
        self, item: torch.Tensor, count: collections.abc.Callable[[ItemEvents, int], torch.Tensor]
    ) -> torch.Tensor:
        total = torch.zeros((), device=item.device) if self.bias_V is None else self.bias_V[item]
        if self.events is not None and self.weight_W is not None:
            for weight, days in zip(self.weight_W, self.recent_days, strict=True):
                # Added in one order, whatever the shape, so that equal items tie to the last bit.
                total = total + weight * count(self.events, window_seconds(days)).to(weight.dtype).log1p()
        return total
