"""DIN (arXiv:1706.06978): an activation unit weighs each history token for each candidate.

Sizes and the softmax over the history (the paper has none) follow the official GPSD variant.

Shape letters: S tokens in packed order, T history tokens, C candidates, P pairs, F token features, D width, N = F D.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.pairs import Pairs, pair_up, pool, softmax, split_tokens
from gpsd_dist.model.transformer import init_linear


class Dice(nn.Module):
    """Dice activation (section 5.2 of the paper): s where the gate p(s) is 1, alpha s where it is 0, per channel.

    The paper standardises s by the mean and variance of the mini-batch (running averages in evaluation). Here slope and
    threshold are learned, which spans the same functions in evaluation. So the score of a candidate depends neither on
    the rest of the batch nor on the number of ranks.
    """

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.slope = nn.Parameter(torch.ones(width))
        self.threshold = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., width] -> [..., width]."""
        gate = torch.sigmoid(self.slope * (x - self.threshold))
        return x * (self.alpha + (1 - self.alpha) * gate)


class ActivationUnit(nn.Module):
    """Scores every pair by an MLP over [candidate, token, candidate - token, candidate * token] (figure 2)."""

    def __init__(self, width: int, hidden_widths: tuple[int, ...], init_std: float):
        super().__init__()
        widths = itertools.pairwise((4 * width, *hidden_widths))
        self.linears = nn.ModuleList(nn.Linear(left, right) for left, right in widths)
        self.linears.append(nn.Linear(hidden_widths[-1], 1, bias=False))  # a bias would cancel in the softmax
        self.dices = nn.ModuleList(Dice(hidden) for hidden in hidden_widths)
        for linear in self.linears:
            init_linear(linear, init_std)

    def forward(self, candidate_CN: torch.Tensor, history_TN: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Returns scores [P]. The first layer is linear in its four parts, so only the product is computed per pair;
        the rest is computed once per candidate and once per history token.
        """
        first, *rest = self.linears
        of_candidate, of_token, of_difference, of_product = first.weight.chunk(4, dim=1)
        from_candidate_CH = F.linear(candidate_CN, of_candidate + of_difference, first.bias)
        from_token_TH = F.linear(history_TN, of_token - of_difference)
        candidate_PN, candidate_PH = (x.index_select(0, pairs.candidate_P) for x in (candidate_CN, from_candidate_CH))
        token_PN, token_PH = (x.index_select(0, pairs.token_P) for x in (history_TN, from_token_TH))
        x_P = F.linear(candidate_PN * token_PN, of_product) + candidate_PH + token_PH
        for dice, linear in zip(self.dices, rest, strict=True):
            x_P = linear(dice(x_P))
        return x_P.squeeze(-1)


class DIN(nn.Module):
    """Outputs [attended history, candidate] (`registry.Tower`)."""

    reads_fields, has_segments, drops_inputs = True, False, False
    direct_width = 0

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        width, channels = config.width, num_fields * config.width
        self.out_width, self.mlp_widths = 2 * channels, (2 * width, width)
        self.attention = ActivationUnit(channels, (max(width // 2, 1), max(width // 4, 1)), config.head_init_std)

    def forward(self, x_SFD: torch.Tensor, packing: Packing, candidates_only: bool = False, times=None) -> torch.Tensor:
        """Maps token vectors [S, F, D] -> [C, 2 N]."""
        history_TN, candidate_CN = (part.flatten(1) for part in split_tokens(x_SFD, packing, candidates_only))
        pairs = pair_up(packing)
        weight_P = softmax(self.attention(candidate_CN, history_TN, pairs), pairs)
        return torch.cat((pool(history_TN, weight_P, pairs), candidate_CN), dim=-1)
