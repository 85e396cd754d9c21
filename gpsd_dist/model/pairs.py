"""Pairs candidates with the histories of their requests, without padding, for models with target attention.

Shape letters: S tokens in packed order (T of histories, then C candidates), F token features, D width, N = F D channels
of a token, P pairs of a candidate and a token of its own history, B requests.
"""

import typing

import torch
import torch.nn.functional as F

from gpsd_dist.batch.packing import Packing


class Pairs(typing.NamedTuple):
    """Lists every candidate with every token of its history, int64, in the order of candidates, then of time."""

    candidate_P: torch.Tensor
    token_P: torch.Tensor
    offsets: torch.Tensor  # [C + 1]: pairs offsets[c] to offsets[c + 1] belong to candidate c


def pair_up(packing: Packing) -> Pairs:
    """Lists all pairs of a batch. The host knows their number, so there is no GPU sync."""
    length_C = packing.history_offsets.diff()[packing.request_C]
    offsets = F.pad(length_C.cumsum(0), (1, 0))
    candidate_C = torch.arange(packing.num_candidates, device=offsets.device)
    candidate_P = torch.repeat_interleave(candidate_C, length_C, output_size=packing.num_pairs)
    start_C = packing.history_offsets[packing.request_C] - offsets[:-1]
    token_P = torch.arange(packing.num_pairs, device=offsets.device) + start_C[candidate_P]
    return Pairs(candidate_P, token_P, offsets)


def softmax(score_P: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Takes the softmax over the history of each candidate, in float32 at least: [P] -> [P]."""
    score_P = score_P.to(torch.promote_types(score_P.dtype, torch.float32))
    zero_C = score_P.new_zeros(len(pairs.offsets) - 1)
    largest_C = zero_C.scatter_reduce(0, pairs.candidate_P, score_P.detach(), "amax", include_self=False)
    power_P = (score_P - largest_C[pairs.candidate_P]).exp()
    return power_P / zero_C.index_add(0, pairs.candidate_P, power_P)[pairs.candidate_P]


def pool(value_TN: torch.Tensor, weight_P: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Sums the history of each candidate by weight: [T, N] -> [C, N], zero for an empty history."""
    return F.embedding_bag(  # It gathers, weighs and adds at once, so [P, N] is never in memory.
        pairs.token_P,
        value_TN.to(weight_P.dtype),
        pairs.offsets,
        mode="sum",
        per_sample_weights=weight_P,
        include_last_offset=True,
    )


def sum_histories(x_TN: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Sums each request's history: [T, ...] -> [B, ...], zero for an empty one."""
    zero_BN = x_TN.new_zeros(packing.num_requests, *x_TN.shape[1:])
    return zero_BN.index_add(0, packing.request_T, x_TN)


def join(
    parts: list[torch.Tensor], history_TN: torch.Tensor, candidate_CN: torch.Tensor, packing: Packing, scaled: bool
) -> torch.Tensor:
    """Joins the MLP input of DIEN and DMIN: [*parts, sum of the history, its product with the candidate, candidate].

    `scaled`: the sum is divided by the root of the history's length, so that it is of the size of one event.
    """
    sum_BN = sum_histories(history_TN, packing)
    if scaled:
        sum_BN = sum_BN * packing.history_offsets.diff().clamp(min=1).to(sum_BN.dtype).rsqrt()[:, None]
    sum_CN = sum_BN[packing.request_C]
    return torch.cat((*parts, sum_CN, sum_CN * candidate_CN, candidate_CN), dim=-1)


def split_tokens(x_SFD: torch.Tensor, packing: Packing, candidates_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits fields into those of histories [T, F, D] and of candidates [C, F, D].

    ValueError unless `candidates_only`, because the models that call this have no states for histories.
    """
    if not candidates_only:
        raise ValueError("this model scores candidates and gives histories no states: call it with candidates_only")
    return x_SFD.tensor_split([packing.num_history_tokens])
