"""DIEN (arXiv:1809.03672): a GRU extracts interests from a history, a second one evolves those near the candidate.

Sizes, and target attention by DIN's activation unit, follow the official GPSD variant; the second GRU is the paper's
AUGRU. Both run over time on the sequences that have not ended yet, never on padding.

Shape letters: S tokens in packed order, T history tokens, C candidates, P pairs, B requests, F token features, D width,
N = F D channels of a token and of a state.
"""

import typing

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.uncompiled import uncompiled
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.din import ActivationUnit
from gpsd_dist.model.pairs import join, pair_up, softmax, split_tokens


class TimeMajor(typing.NamedTuple):
    """Orders the entries of jagged rows by step, the longest row first, like a PackedSequence."""

    alive_L: np.ndarray
    """int64 on the host: number of rows with an entry at each step; there is at least one step, maybe empty."""
    row_N: torch.Tensor  # int64 row of each entry
    step_N: torch.Tensor  # int64 position of each entry in its row


def time_major(length_R: np.ndarray, on_device_R: torch.Tensor) -> TimeMajor:
    """Builds the order from lengths, which must ascend and are wanted twice: on the host and on the device."""
    # The host has to know the sizes of the steps. To copy them to a GPU would make it wait, so they are counted twice.
    num_rows, num_steps = len(length_R), max(length_R.max(initial=0), 1)
    alive_L = num_rows - np.searchsorted(length_R, np.arange(num_steps), side="right")
    steps = torch.arange(num_steps, device=on_device_R.device)
    alive = num_rows - torch.searchsorted(on_device_R, steps, right=True)
    num_entries = int(alive_L.sum())
    step_N = torch.repeat_interleave(alive, output_size=num_entries)
    place_N = torch.arange(num_entries, device=alive.device) - (alive.cumsum(0) - alive)[step_N]
    return TimeMajor(alive_L, num_rows - 1 - place_N, step_N)


class AttentionalGRU(nn.Module):
    """AUGRU scales a GRU's update gate by attention (interest evolving layer of the paper)."""

    def __init__(self, width: int):
        super().__init__()
        self.of_input = nn.Linear(width, 3 * width)
        self.of_state = nn.Linear(width, 3 * width)
        for parameter in self.parameters():  # initialised like torch.nn.GRU
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    @uncompiled
    def forward(self, gates_P: torch.Tensor, weight_P: torch.Tensor, alive_L: np.ndarray, num_rows: int):
        """Returns last states [rows, N] in ascending order of length, zero for rows without entries.

        `gates_P` [P, 3 N] is `of_input` of the inputs, `weight_P` [P] their attention, both time-major.
        """
        state = gates_P.new_zeros(num_rows, gates_P.shape[1] // 3)
        finished = []
        steps = zip(gates_P.split(alive_L.tolist()), weight_P[:, None].split(alive_L.tolist()), strict=True)
        for gates, weight in steps:  # The longest rows come first, so the rows that end here are the last ones.
            state, ended = state.split([len(gates), len(state) - len(gates)])
            finished.append(ended)
            reset_in, update_in, new_in = gates.chunk(3, dim=-1)
            reset_state, update_state, new_state = self.of_state(state).chunk(3, dim=-1)
            update = weight * torch.sigmoid(update_in + update_state)
            new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_state) * new_state)
            state = torch.lerp(state, new, update.to(state.dtype))
        return torch.cat((state, *reversed(finished))).flip(0)


class DIEN(nn.Module):
    """Outputs [final interest, sum of the history, its product with the candidate, candidate] (`registry.Tower`)."""

    reads_fields, has_segments, drops_inputs = True, False, False
    direct_width = 0

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        width, channels, self.scales_sum = config.width, num_fields * config.width, config.scales_history_sum
        self.out_width, self.mlp_widths = 4 * channels, (2 * width, width)
        self.extractor = nn.GRU(channels, channels)
        self.attention = ActivationUnit(channels, (4 * width, 2 * width), config.head_init_std)
        self.evolution = AttentionalGRU(channels)

    def forward(
        self,
        x_SFD: torch.Tensor,
        packing: Packing,
        candidates_only: bool = False,
        times=None,
        with_history: bool = False,
    ):
        """Maps token vectors [S, F, D] -> [C, 4 N]; `with_history` adds the first GRU's states [T, N]."""
        history_TN, candidate_CN = (part.flatten(1) for part in split_tokens(x_SFD, packing, candidates_only))
        state_TN = self._extract(history_TN, packing)
        final_CN = self._evolve(candidate_CN, state_TN, packing)
        out = join([final_CN], history_TN, candidate_CN, packing, self.scales_sum)
        return (out, state_TN) if with_history else out

    @uncompiled
    def _extract(self, history_TN: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Extracts interests, once per request for all its candidates: [T, N] -> [T, N]"""
        # In float32: autocast hands cuDNN a GRU in float16, whatever it was told, where small gradients vanish.
        history_TN = history_TN.to(self.extractor.weight_ih_l0.dtype)
        with torch.autocast(history_TN.device.type, enabled=False):
            if not packing.num_history_tokens:  # torch's GRU refuses empty batches, but DDP needs its weights.
                return self.extractor(history_TN.new_zeros(1, history_TN.shape[1]))[0][:0]
            order = time_major(packing.history_length_B, packing.history_offsets.diff())
            token_T = packing.history_offsets[order.row_N] + order.step_N
            packed = PackedSequence(history_TN.index_select(0, token_T), torch.from_numpy(order.alive_L))
            state = self.extractor(packed)[0].data
            return torch.zeros_like(state).index_copy(0, token_T, state)

    def _evolve(self, candidate_CN: torch.Tensor, state_TN: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Evolves interests per candidate, with input gates computed once per token: [C, N], [T, N] -> [C, N]"""
        pairs = pair_up(packing)
        weight_P = softmax(self.attention(candidate_CN, state_TN, pairs), pairs)
        length_C = np.repeat(packing.history_length_B, packing.candidate_count_B)
        order = time_major(length_C, packing.history_offsets.diff()[packing.request_C])
        pair_P = pairs.offsets[order.row_N] + order.step_N
        gates_P = self.evolution.of_input(state_TN).index_select(0, pairs.token_P[pair_P])
        return self.evolution(gates_P, weight_P[pair_P], order.alive_L, packing.num_candidates)
