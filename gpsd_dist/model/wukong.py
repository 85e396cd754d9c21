"""Wukong (arXiv:2403.02545): stacked factorisation machines over a fixed number of fields.

As in the official GPSD variant, every feature of every history token and of the candidate is a field with weights of
its own. So a history has `max_positions` slots: the latest event has the first one, slots without an event are zero.

Shape letters: S tokens in packed order, T history tokens, C candidates, B requests, F token features, D width,
n = F (1 + max_positions) fields, W slots per history of a length bucket, M mixtures of fields that a layer needs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.uncompiled import uncompiled
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.pairs import split_tokens
from gpsd_dist.model.transformer import init_linear

_FM_RANK, _FM_FIELDS, _LINEAR_FIELDS = 24, 16, 16  # official settings
_FM_HIDDEN = 512
_OUT_FIELDS = _FM_FIELDS + _LINEAR_FIELDS
_MLP_MULTIPLE = 4  # hidden width of the ranking MLP over D, like the Transformer's


class Layer(nn.Module):
    """Computes norm([FMB(X), LCB(X)] + residual): n fields -> 32 fields (section 3 of the paper).

    FMB is MLP(norm(X X^T Y)), a factorisation machine compressed by the learned Y. LCB is W X. The residual is X, or
    another W X where the number of fields changes. `mixing` [n, M] holds Y and both W side by side.

    The official MLP has a batch norm before its ReLU. In evaluation that is one factor and one shift per channel, which
    the linear layer in front of it spans. So it is left out: with it, the score of a candidate in training would depend
    on the rest of the batch, on how rows fall on ranks, and on how many candidates share a request.
    """

    def __init__(self, num_fields: int, width: int, init_std: float, projects_residual: bool):
        super().__init__()
        self.projects_residual = projects_residual
        num_mixtures = _FM_RANK + _LINEAR_FIELDS + (_OUT_FIELDS if projects_residual else 0)
        self.mixing = nn.Parameter(torch.empty(num_fields, num_mixtures))
        nn.init.normal_(self.mixing, std=init_std or num_fields**-0.5)
        self.fm_norm = nn.LayerNorm(num_fields * _FM_RANK)
        self.fm = nn.Sequential(
            nn.Linear(num_fields * _FM_RANK, _FM_HIDDEN), nn.ReLU(), nn.Linear(_FM_HIDDEN, _FM_FIELDS * width)
        )
        self.norm = nn.LayerNorm(width)
        for module in self.fm:
            if isinstance(module, nn.Linear):
                init_linear(module, init_std)

    def forward(self, x_CnD: torch.Tensor) -> torch.Tensor:
        """Maps [C, n, D] -> [C, 32, D]."""
        mixed_CMD = self.mixing.t() @ x_CnD
        return self.combine(interactions(x_CnD, mixed_CMD), mixed_CMD, x_CnD)

    def combine(self, fm_CnR: torch.Tensor, mixed_CMD: torch.Tensor, x_CnD: torch.Tensor | None) -> torch.Tensor:
        """Maps X X^T Y [C, n, rank], mixtures [C, M, D], and X if it is the residual, to [C, 32, D]."""
        fm_CfD = self.fm(self.fm_norm(fm_CnR.flatten(1))).unflatten(1, (_FM_FIELDS, -1))
        linear_ClD, residual = mixed_CMD[:, _FM_RANK:].tensor_split([_LINEAR_FIELDS], dim=1)
        return self.norm(torch.cat((fm_CfD, linear_ClD), dim=1) + (residual if self.projects_residual else x_CnD))


def interactions(x_CnD: torch.Tensor, mixed_CMD: torch.Tensor) -> torch.Tensor:
    """Computes X X^T Y in the order that is linear in the number of fields: [C, n, D], [C, M, D] -> [C, n, rank]"""
    return x_CnD @ mixed_CMD[:, :_FM_RANK].mT


class Wukong(nn.Module):
    """Outputs all fields of the last layer (`registry.Tower`)."""

    reads_fields, has_segments, drops_inputs = True, False, False
    direct_width = 0

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        self.max_positions, width, init_std = config.max_positions, config.width, config.init_std
        self.out_width, self.mlp_widths = _OUT_FIELDS * width, (_MLP_MULTIPLE * width,)
        first = Layer(num_fields * (1 + config.max_positions), width, init_std, projects_residual=True)
        others = (Layer(_OUT_FIELDS, width, init_std, projects_residual=False) for _ in range(config.layers - 1))
        self.layers = nn.ModuleList((first, *others))

    def forward(self, x_SFD: torch.Tensor, packing: Packing, candidates_only: bool = False, times=None) -> torch.Tensor:
        """Maps token vectors [S, F, D] -> [C, 32 D]. ValueError for a history longer than `max_positions`."""
        if packing.max_history_length > self.max_positions:
            raise ValueError(
                f"a history of {packing.max_history_length} tokens does not fit into {self.max_positions} slots: "
                "raise ModelConfig.max_positions or lower MAX_HISTORY_LENGTH"
            )
        x_CfD = self._first_layer(*split_tokens(x_SFD, packing, candidates_only), packing)
        for layer in self.layers[1:]:
            x_CfD = layer(x_CfD)
        return x_CfD.flatten(1)

    @uncompiled
    def _first_layer(self, history_TFD: torch.Tensor, candidate_CFD: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Mixes a history once per request, in as many slots as the longest one of its length bucket has."""
        first, num_fields = self.layers[0], candidate_CFD.shape[1]
        slots = _slots(history_TFD, packing)
        mixed = [first.mixing[num_fields:][: x_nsD.shape[1]].t() @ x_nsD for x_nsD in slots]
        mixed_BMD = torch.cat([*mixed, candidate_CFD.new_zeros(0, first.mixing.shape[1], candidate_CFD.shape[2])])
        mixed_CMD = first.mixing[:num_fields].t() @ candidate_CFD + mixed_BMD[packing.request_C]
        counts = [bucket.num_candidates for bucket in packing.buckets]
        parts = [candidate_CFD.new_zeros(0, num_fields * self.max_positions, _FM_RANK)]
        first_request = 0
        for x_nsD, request_c, mixed_cMD in zip(slots, packing.request_C.split(counts), mixed_CMD.split(counts)):
            fm_csR = interactions(x_nsD[request_c - first_request], mixed_cMD)
            parts.append(F.pad(fm_csR, (0, 0, 0, parts[0].shape[1] - fm_csR.shape[1])))
            first_request += len(x_nsD)
        fm_CnR = torch.cat((interactions(candidate_CFD, mixed_CMD), torch.cat(parts)), dim=1)
        return first.combine(fm_CnR, mixed_CMD, None)


def _slots(history_TFD: torch.Tensor, packing: Packing) -> list[torch.Tensor]:
    """Fills the slots of each length bucket [n, W F, D]: latest event first, zero behind the earliest."""
    request_T = packing.request_T
    last_T = packing.history_offsets[1:][request_T] - 1
    recency_T = last_T - torch.arange(packing.num_history_tokens, device=last_T.device)
    slots, first_request, first_token = [], 0, 0
    for bucket in packing.buckets:
        tokens = slice(first_token, first_token + bucket.num_tokens)
        slot_t = (request_T[tokens] - first_request) * bucket.width + recency_T[tokens]
        empty = history_TFD.new_zeros(bucket.num_requests * bucket.width, *history_TFD.shape[1:])
        x_sFD = empty.index_copy(0, slot_t, history_TFD[tokens])
        slots.append(x_sFD.reshape(bucket.num_requests, bucket.width * history_TFD.shape[1], history_TFD.shape[2]))
        first_request, first_token = first_request + bucket.num_requests, tokens.stop
    return slots
