"""Holds what is learnt of an item's score beside its cosine: a bias per item, and what recent counts weigh.

Shape letters: V rows of the item table, W windows, E width of a state, M states.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_LOG_LONGEST_S = 20.0  # 15 years


class ItemScore(nn.Module):
    """Adds to cosines, in their unit, and starts at zero: a model begins with its cosines alone.

    The weight of a window is linear in the unit state and the time since the last event: whoever goes through old films
    within a minute follows the news less than one who comes back after a week. None where an option is off.
    """

    def __init__(self, num_rows: int, has_bias: bool, num_windows: int, width: int):
        super().__init__()
        self.bias_V = nn.Parameter(torch.zeros(num_rows)) if has_bias else None
        # F: the state, the time since the last event, 1. Logits are scores / temperature, so they move fast enough.
        self.weight_WF = nn.Parameter(torch.zeros(num_windows, width + 2)) if num_windows else None

    def views(self) -> list[torch.Tensor | None]:
        """Returns views of both parts, through which gradients flow."""
        return [None if part is None else part.view_as(part) for part in (self.bias_V, self.weight_WF)]

    def whole(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns both without gradient. Collective under FSDP2, which shards them."""
        parts = (self.bias_V, self.weight_WF)
        bias_V, weight_WF = (p.full_tensor() if isinstance(p, DTensor) else p for p in parts)
        return (None if bias_V is None else bias_V.detach()), (None if weight_WF is None else weight_WF.detach())


def window_weights(
    weight_WF: torch.Tensor, unit_ME: torch.Tensor, last_time_s_M: torch.Tensor, time_s_M: torch.Tensor
) -> torch.Tensor:
    """Weighs the windows for each state: [M, W]. Times are int64, those of its last event and of what it predicts."""
    is_known_M = (last_time_s_M >= 0) & (time_s_M >= 0)
    gap_s_M = torch.where(is_known_M, time_s_M - last_time_s_M, 0).clamp(min=0).to(weight_WF.dtype)
    gap_M = (gap_s_M.log1p() / _LOG_LONGEST_S).clamp(max=1)
    unit_ME = unit_ME.to(weight_WF.dtype)
    return torch.cat((unit_ME, gap_M[:, None], torch.ones_like(gap_M)[:, None]), 1) @ weight_WF.t()
