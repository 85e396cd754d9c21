"""Computes the auxiliary loss of DIEN and DMIN (arXiv:1809.03672).

Shape letters: T history tokens, N width of a token.
"""

import torch
import torch.nn.functional as F


def next_behaviour(
    state_TN: torch.Tensor,
    token_TN: torch.Tensor,
    position_T: torch.Tensor,
    item_T: torch.Tensor,
    negative_T: torch.Tensor,
) -> torch.Tensor:
    """Sums the auxiliary loss of DIEN (arXiv:1809.03672, interest extractor layer): the inner product of the state
    before a history token with that token is a logit of label 1, with another token of the batch one of label 0.

    `position_T`: 0 for a history's first token, which nothing predicts. `negative_T` int64 [T]: the other token; one
    with the same item is left out.
    """
    # One shift for the whole batch: the pairs across two histories are masked below, where the position is 0.
    state, token = state_TN[:-1].float(), token_TN.float()
    yes = F.softplus(-(state * token[1:]).sum(-1))
    no = F.softplus((state * token[negative_T[1:]]).sum(-1))
    no = torch.where(item_T[negative_T[1:]] == item_T[1:], 0.0, no)
    is_predicted = position_T[1:] > 0
    return torch.where(is_predicted, yes + no, 0.0).sum()
