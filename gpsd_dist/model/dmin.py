"""DMIN (CIKM'20, doi:10.1145/3340531.3412092): self-attention refines a history, heads of a second one are interests.

Sizes and layers follow the official GPSD variant: residuals without the paper's LayerNorms, biases in the refining
attention alone. Both self-attentions are causal, so that the next behaviour can supervise a refined one.

Shape letters: S tokens in packed order, T history tokens, C candidates, F token features, D width, N = F D channels of
a token, H heads, K = N / H head width.
"""

import torch
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.din import ActivationUnit
from gpsd_dist.model.ops.attention import attend
from gpsd_dist.model.pairs import Pairs, join, pair_up, pool, softmax, split_tokens
from gpsd_dist.model.transformer import init_linear

_FFN_MULTIPLE = 2  # hidden width of a feed-forward over N: 4 d with two features (official settings)


class Refinement(nn.Module):
    """Completes a transformer layer after its attention: x + projected attention, then x + ReLU FFN(x)."""

    def __init__(self, in_width: int, width: int, dropout: float, *, bias: bool):
        super().__init__()
        self.project = nn.Linear(in_width, width, bias=bias)
        hidden = _FFN_MULTIPLE * width
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TN: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Maps [T, N], [T, in_width] -> [T, N]."""
        x_TN = x_TN + self.dropout(self.project(attended))
        return x_TN + self.dropout(self.ffn(x_TN))


class DMIN(nn.Module):
    """Outputs [H interests, sum of the history, its product with the candidate, candidate] (`registry.Tower`)."""

    reads_fields, has_segments, drops_inputs = True, False, False
    direct_width = 0

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        if num_fields * config.width % config.heads:
            raise ValueError(
                f"dmin splits {num_fields} token features x width {config.width} channels into {config.heads} heads: "
                "choose a WIDTH that is a multiple of HEADS"
            )
        width, channels, dropout = config.width, num_fields * config.width, config.dropout
        self.heads, self.scales_sum = config.heads, config.scales_history_sum
        heads = config.heads
        self.out_width, self.mlp_widths = (heads + 3) * channels, (2 * width, width)
        self.refiner_qkv = nn.Linear(channels, 3 * channels)
        self.refiner = Refinement(channels, channels, dropout, bias=True)
        self.extractor_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.interests = nn.ModuleList(
            Refinement(channels // heads, channels, dropout, bias=False) for _ in range(heads)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, config.init_std)
        widths = (4 * width, 2 * width)
        self.attentions = nn.ModuleList(ActivationUnit(channels, widths, config.head_init_std) for _ in range(heads))

    def forward(
        self,
        x_SFD: torch.Tensor,
        packing: Packing,
        candidates_only: bool = False,
        times=None,
        with_history: bool = False,
    ):
        """Maps token vectors [S, F, D] -> [C, (H + 3) N]; `with_history` adds the refined behaviours [T, N]."""
        history_TN, candidate_CN = (part.flatten(1) for part in split_tokens(x_SFD, packing, candidates_only))
        histories, pairs = packing.without_candidates(), pair_up(packing)
        refined_TN = self.refiner(history_TN, self._attend(self.refiner_qkv(history_TN), histories))
        head_THK = self._attend(self.extractor_qkv(refined_TN), histories).unflatten(-1, (self.heads, -1))
        parts = [self._interest(h, candidate_CN, refined_TN, head_THK[:, h], pairs) for h in range(self.heads)]
        out = join(parts, history_TN, candidate_CN, packing, self.scales_sum)
        return (out, refined_TN) if with_history else out

    def _attend(self, qkv: torch.Tensor, histories: Packing) -> torch.Tensor:
        """Attends causally over each history: [T, 3 N] -> [T, N]"""
        return attend(qkv.unflatten(-1, (3, self.heads, -1)), histories)

    def _interest(self, index: int, candidate_CN, refined_TN, head_TK, pairs: Pairs) -> torch.Tensor:
        """Extracts the interest of one head, by target attention: [C, N]"""
        interest_TN = self.interests[index](refined_TN, head_TK)
        weight_P = softmax(self.attentions[index](candidate_CN, interest_TN, pairs), pairs)
        return pool(interest_TN, weight_P, pairs)
