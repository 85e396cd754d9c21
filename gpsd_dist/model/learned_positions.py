"""Adds learned positions to scaled tokens, for SASRec (arXiv:1808.09781) and HSTU (arXiv:2402.17152).

Shape letters: S tokens in packed order, D width.
"""

import torch
from torch import nn


class LearnedPositions(nn.Module):
    """Computes dropout(x sqrt(D) + vector of the position); vectors start from N(0, 1 / D), cut at two sigma."""

    def __init__(self, max_positions: int, width: int, dropout: float):
        super().__init__()
        self.scale = width**0.5
        self.table = nn.Embedding(max_positions, width)
        self.dropout = nn.Dropout(dropout)
        std = width**-0.5
        nn.init.trunc_normal_(self.table.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x_SD: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
        """Maps [S, D] and positions int64 [S] below max_positions to [S, D]."""
        return self.dropout(x_SD * self.scale + self.table(position_S))
