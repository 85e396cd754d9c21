"""DeepFM (arXiv:1703.04247): a factorisation machine and an MLP read the same fields.

As in the official GPSD variant, the fields are the candidate's features and the means of the history's features.

Shape letters: S tokens in packed order, T history tokens, C candidates, B requests, F token features, D width.
"""

import torch
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.pairs import split_tokens, sum_histories


class DeepFM(nn.Module):
    """Outputs [interactions, fields] (`registry.Tower`). The deep part is the ranking MLP; interactions skip it."""

    reads_fields, has_segments, drops_inputs = True, False, False
    direct_width = 1

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        width = config.width
        self.out_width, self.mlp_widths = 1 + 2 * num_fields * width, (2 * width, width, width)

    def forward(self, x_SFD: torch.Tensor, packing: Packing, candidates_only: bool = False, times=None) -> torch.Tensor:
        """Maps token vectors [S, F, D] -> [C, 1 + 2 F D]."""
        history_TFD, candidate_CFD = split_tokens(x_SFD, packing, candidates_only)
        length_B11 = packing.history_offsets.diff().clamp(min=1)[:, None, None]
        mean_BFD = sum_histories(history_TFD, packing) / length_B11
        fields = torch.cat((candidate_CFD, mean_BFD[packing.request_C]), dim=1)
        return torch.cat((pairwise_products(fields)[:, None], fields.flatten(1)), dim=1)


def pairwise_products(fields: torch.Tensor) -> torch.Tensor:
    """Sums the inner products of all pairs of fields (eq. 2 of the paper): [C, fields, D] -> [C]."""
    return 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(-1)
