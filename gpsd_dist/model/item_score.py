"""Holds what is learnt of an item's score beside its cosine: a bias per item, and a weight per window of recent counts.

Shape letters: V rows of the item table, W windows.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class ItemScore(nn.Module):
    """Is None where an option is off.

    Weights start at 1 / W, so a model begins near the floor: as likely as often, which a rate of 1e-3 would take a
    thousand steps to learn.
    """

    def __init__(self, num_rows: int, has_bias: bool, num_windows: int):
        super().__init__()
        self.bias_V = nn.Parameter(torch.zeros(num_rows)) if has_bias else None
        self.weight_W = nn.Parameter(torch.full((num_windows,), 1 / num_windows)) if num_windows else None

    def whole(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns bias [V] and weights [W] without gradient. Collective under FSDP2, which shards them."""
        parts = (self.bias_V, self.weight_W)
        bias_V, weight_W = (p.full_tensor() if isinstance(p, DTensor) else p for p in parts)
        return (None if bias_V is None else bias_V.detach()), (None if weight_W is None else weight_W.detach())
