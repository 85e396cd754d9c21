"""Attends causally over packed histories; each candidate sees its history and itself (GPSD, figure 3).

Two implementations must agree: `bucketed` (SDPA in length buckets; any device and dtype) and `two_part` (flash kernels
on the packed tokens, for CUDA in half precision; its CPU kernel serves tests).

Shape letters: T history tokens, C candidates, S = T + C tokens, H heads, K head width, n requests of a bucket,
W slots per history, J candidates per request of a bucket.
"""

import torch
import torch.nn.functional as F

from gpsd_dist.batch.packing import Bucket, Packing, Slots
from gpsd_dist.batch.uncompiled import uncompiled
from gpsd_dist.model.ops.flash_attention import MAX_HEAD_WIDTH, two_part_attention
from gpsd_dist.model.ops.row_attention import in_rows


def attend(
    qkv_S3HK: torch.Tensor, packing: Packing, candidates_only: bool = False, dropout: float = 0.0
) -> torch.Tensor:
    """Computes the attention output [S, H * K] for queries, keys and values of all tokens in packed order.

    `candidates_only` computes the candidates' output only, [C, H * K], which is all that a ranking model's last layer
    needs. `dropout` of the attention weights: give 0 in evaluation; the flash kernel has none.
    """
    is_half = qkv_S3HK.dtype in (torch.bfloat16, torch.float16)
    if qkv_S3HK.is_cuda and is_half and not dropout and qkv_S3HK.shape[-1] <= MAX_HEAD_WIDTH:
        return two_part(qkv_S3HK, packing, candidates_only)
    return _by_length(qkv_S3HK, packing, candidates_only, dropout)


@uncompiled
def _by_length(qkv_S3HK: torch.Tensor, packing: Packing, candidates_only: bool, dropout: float) -> torch.Tensor:
    # A shared row computes every token's attention, so for candidates alone buckets take a half of its time at length 9
    # and a fiftieth at 1,000.
    if not qkv_S3HK.is_cuda and not candidates_only and packing.rows is not None:
        return in_rows(qkv_S3HK, packing.rows, dropout)
    return bucketed(qkv_S3HK, packing, candidates_only, dropout)


def bucketed(
    qkv_S3HK: torch.Tensor, packing: Packing, candidates_only: bool = False, dropout: float = 0.0
) -> torch.Tensor:
    """Attends bucket by bucket. Padding is to the right of every token, so the causal mask hides it."""
    buckets = packing.device_buckets
    if not (packing.num_candidates or (packing.num_history_tokens and not candidates_only)):
        return qkv_S3HK[:0, 0].flatten(1)  # no token to attend
    # The backward of one split is one concatenation; that of a slice per bucket would write all S tokens every time.
    parts = qkv_S3HK.split([b.num_tokens for b in buckets] + [b.num_candidates for b in buckets])
    history_parts, candidate_parts = [], []
    for bucket, history_t3HK, candidate_c3HK in zip(buckets, parts[: len(buckets)], parts[len(buckets) :], strict=True):
        history_3nHWK = to_slots(history_t3HK, bucket.history, bucket.num_requests, bucket.width)
        if bucket.num_tokens and not candidates_only:
            out_nHWK = F.scaled_dot_product_attention(*history_3nHWK.unbind(0), is_causal=True, dropout_p=dropout)
            history_parts.append(from_slots(out_nHWK, bucket.history))
        if bucket.num_candidates:
            candidate_3nHJK = to_slots(candidate_c3HK, bucket.candidate, bucket.num_requests, bucket.max_candidates)
            out_nHJK = _candidates_attend(candidate_3nHJK, history_3nHWK, bucket, dropout)
            candidate_parts.append(from_slots(out_nHJK, bucket.candidate))
    return torch.cat(history_parts + candidate_parts)


def _candidates_attend(
    candidate_3nHJK: torch.Tensor, history_3nHWK: torch.Tensor, bucket: Bucket, dropout: float
) -> torch.Tensor:
    """Attends from each candidate to its history and itself, which equals K separate causal passes."""
    query, own_key, own_value = candidate_3nHJK.unbind(0)
    _, key, value = history_3nHWK.unbind(0)
    if bucket.candidate_mask is None:
        return _many_candidates_attend(query, own_key, own_value, key, value, bucket=bucket, dropout=dropout)
    keys, values = torch.cat((key, own_key), dim=2), torch.cat((value, own_value), dim=2)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=bucket.candidate_mask, dropout_p=dropout)


def _many_candidates_attend(query, own_key, own_value, key, value, *, bucket: Bucket, dropout: float) -> torch.Tensor:
    """Attends without scores between candidates, so the cost is linear in their number. All [n, H, slots, K]."""
    query = query * query.shape[-1] ** -0.5
    score_nHJW = query @ key.transpose(-1, -2)
    if bucket.history is not None:
        score_nHJW = score_nHJW.masked_fill(~bucket.history.is_entry[:, None, None], float("-inf"))
    own_score_nHJ1 = (query * own_key).sum(-1, keepdim=True)
    weight = F.dropout(torch.cat((score_nHJW, own_score_nHJ1), -1).softmax(-1), dropout)
    return weight[..., :-1] @ value + weight[..., -1:] * own_value


def to_slots(packed_t3HK: torch.Tensor, slots: Slots | None, num_requests: int, width: int) -> torch.Tensor:
    """Pads one bucket: [t, 3, H, K] -> [3, n, H, W, K]."""
    if slots is not None:
        packed_t3HK = packed_t3HK.index_select(0, slots.entry)
    return packed_t3HK.unflatten(0, (num_requests, width)).permute(2, 0, 3, 1, 4)


def from_slots(out_nHWK: torch.Tensor, slots: Slots | None) -> torch.Tensor:
    """Drops the padding again: [n, H, W, K] -> [t, H * K]."""
    out = out_nHWK.transpose(1, 2).flatten(0, 1).flatten(1)
    return out if slots is None else out.index_select(0, slots.slot)


def two_part(qkv_S3HK: torch.Tensor, packing: Packing, candidates_only: bool = False) -> torch.Tensor:
    """Attends without padding by two flash calls: histories over themselves, candidates over their histories."""
    sizes = packing.num_history_tokens, packing.max_history_length, packing.max_candidates
    offsets = packing.history_offsets, packing.candidate_offsets
    return two_part_attention(qkv_S3HK, *offsets, sizes, candidates_only).flatten(1)
