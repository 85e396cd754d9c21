"""HSTU (arXiv:2402.17152, section 3.2): gated attention without softmax, biased by position and time.

One layer: U, V, Q, K = SiLU(norm(x) W), then x + Wo dropout(U * norm(attention(Q, K, V))). Norms have no weights. The
attention is in `hstu_attention`. Unlike all other towers here, HSTU with its time bias sees at a history token *when*
the event that it predicts happens; `time_bias=False` takes that away.

Shape letters: S tokens in packed order (T of histories, then C candidates), D width, H heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.learned_positions import LearnedPositions
from gpsd_dist.model.ops import hstu_attention, hstu_bias
from gpsd_dist.model.transformer import init_linear, start_matching

NORM_EPS = 1e-6
_BIAS_STD = 0.02


class HSTUBlock(nn.Module):
    """Implements one layer, which has bias weights of its own."""

    def __init__(self, width: int, heads: int, head_width: int, max_positions: int, *, dropout: float, time_bias: bool):
        super().__init__()
        self.heads = heads
        self.uvqk = nn.Linear(width, 4 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width)
        self.dropout = nn.Dropout(dropout)
        self.position_bias = nn.Parameter(torch.empty(2 * max_positions - 1).normal_(std=_BIAS_STD))
        time_weights = torch.empty(hstu_bias.NUM_TIME_BUCKETS).normal_(std=_BIAS_STD) if time_bias else None
        self.time_bias = None if time_weights is None else nn.Parameter(time_weights)

    def forward(
        self, x_SD: torch.Tensor, relations: hstu_bias.Relations, candidates_only: bool = False
    ) -> torch.Tensor:
        """Maps [S, D] -> [S, D], or [C, D] with `candidates_only`."""
        gate, value, query, key = F.silu(self.uvqk(_norm(x_SD))).unflatten(-1, (4, self.heads, -1)).unbind(1)
        bias = hstu_bias.BiasWeights(self.position_bias, self.time_bias)
        qkv_S3HK = torch.stack((query, key, value), dim=1)
        attended = hstu_attention.attend(qkv_S3HK, bias, relations, candidates_only)
        if candidates_only:
            first = relations.packing.num_history_tokens
            gate, x_SD = gate[first:], x_SD[first:]
        return x_SD + self.out(self.dropout(gate.flatten(1) * _norm(attended)))


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class HSTU(nn.Module):
    """Outputs hidden states (`registry.Tower`). Candidates take the position after the last event, and request time."""

    reads_fields, has_segments, drops_inputs = False, False, True
    direct_width = 0

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        width, heads, positions = config.width, config.heads, config.max_positions
        self.out_width, self.mlp_widths = width, (4 * width,)  # not of the paper: the Transformer's ranking MLP
        self.time_bias = config.time_bias
        self.positions = LearnedPositions(positions, width, config.dropout)
        self.blocks = nn.ModuleList(
            HSTUBlock(
                width,
                heads,
                config.head_width or width // heads,
                positions,
                dropout=config.dropout,
                time_bias=config.time_bias,
            )
            for _ in range(config.layers)
        )
        for block in self.blocks:
            init_linear(block.uvqk, config.init_std)
            if config.starts_by_width:
                _, _, query, key = block.uvqk.weight.detach().chunk(4)
                start_matching(query, key, config.heads)
            nn.init.xavier_uniform_(block.out.weight)
            nn.init.zeros_(block.out.bias)

    def forward(self, x_SD: torch.Tensor, packing: Packing, candidates_only: bool = False, times=None) -> torch.Tensor:
        """Maps token vectors [S, D] to hidden states [S, D]; a token sees its request's earlier history and itself.

        `candidates_only` -> [C, D]: in the last layer, histories only give keys and values. `times`: registry.Times;
        None means unknown.
        """
        relations = self._relations(packing, times, hstu_attention.has_kernel(x_SD))
        x_SD = self.positions(x_SD, packing.position_S)
        for index, block in enumerate(self.blocks):
            x_SD = block(x_SD, relations, candidates_only and index == len(self.blocks) - 1)
        return x_SD

    def _relations(self, packing: Packing, times, for_kernel: bool) -> hstu_bias.Relations:
        if not self.time_bias:
            return hstu_bias.Relations(packing, None, None)
        if times is None:
            history_T = torch.full_like(packing.position_S[: packing.num_history_tokens], -1)
            request_B = torch.full_like(packing.history_offsets[1:], -1)
        else:
            history_T, request_B = times
        return hstu_attention.relate(packing, history_T, request_B, for_kernel)
