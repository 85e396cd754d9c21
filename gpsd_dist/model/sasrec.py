"""SASRec (arXiv:1808.09781, section III) as HSTU's authors compare with it: post-norm blocks, only queries normalised.

Pretraining uses our sampled softmax instead of the paper's binary cross entropy. Linear weights start from Xavier's
normal distribution, biases from 0.

Shape letters: S tokens in packed order (T of histories, then C candidates), D width, H heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.learned_positions import LearnedPositions
from gpsd_dist.model.ops.attention import attend

_NORM_EPS = 1e-8


class SASRecBlock(nn.Module):
    """Computes q = norm(x), h = norm(q + attention(q, x, x)), then h + W2 relu(W1 h). Norms have no weights."""

    def __init__(self, width: int, heads: int, ffn_width: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_out = nn.Linear(width, width)
        self.up = nn.Linear(width, ffn_width)
        self.down = nn.Linear(ffn_width, width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.attention_out, self.up, self.down):
            nn.init.xavier_normal_(linear.weight)
        for linear in (self.query, self.key_value):  # The authors have one matrix [3 D, D], hence this deviation.
            nn.init.normal_(linear.weight, std=(2 / (4 * width)) ** 0.5)
        for linear in (self.query, self.key_value, self.attention_out, self.up, self.down):
            nn.init.zeros_(linear.bias)

    def forward(self, x_SD: torch.Tensor, packing: Packing, candidates_only: bool = False) -> torch.Tensor:
        """Maps [S, D] -> [S, D], or [C, D] with `candidates_only`."""
        query_SD = normed(x_SD)
        qkv_S3D = torch.cat((self.query(query_SD), self.key_value(x_SD)), dim=-1)
        weight_dropout = self.dropout.p if self.training else 0.0
        attended = attend(qkv_S3D.unflatten(-1, (3, self.heads, -1)), packing, candidates_only, weight_dropout)
        if candidates_only:
            query_SD = query_SD[packing.num_history_tokens :]
        h = normed(query_SD + self.attention_out(attended))
        return h + self.dropout(self.down(self.dropout(F.relu(self.up(h)))))


def normed(x_SD: torch.Tensor) -> torch.Tensor:
    """Subtracts the mean and divides by the standard deviation: [..., D]."""
    return F.layer_norm(x_SD, x_SD.shape[-1:], eps=_NORM_EPS)


class SASRec(nn.Module):
    """Outputs hidden states (`registry.Tower`). Candidates take the position after the last event."""

    reads_fields, has_segments, drops_inputs = False, False, True
    direct_width = 0

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        width, ffn_width = config.width, config.ffn_width or config.width
        self.out_width, self.mlp_widths = width, (4 * width,)  # not of the paper: the Transformer's ranking MLP
        self.positions = LearnedPositions(config.max_positions, width, config.dropout)
        self.blocks = nn.ModuleList(
            SASRecBlock(width, config.heads, ffn_width, config.dropout) for _ in range(config.layers)
        )

    def forward(self, x_SD: torch.Tensor, packing: Packing, candidates_only: bool = False, times=None) -> torch.Tensor:
        """Maps token vectors [S, D] to hidden states [S, D]; a token sees its request's earlier history and itself.

        `candidates_only` -> [C, D]: in the last layer, histories only give keys and values.
        """
        x_SD = self.positions(x_SD, packing.position_S)
        for index, block in enumerate(self.blocks):
            x_SD = block(x_SD, packing, candidates_only and index == len(self.blocks) - 1)
        return x_SD
