"""Computes HSTU's attention over packed histories and candidates (arXiv:2402.17152, section 3.2): SiLU(q k + bias) / P.

The bias of a pair is a weight of its distance in positions plus a weight of the time between the key's event and the
event *after* the query's, which is the one that the query predicts. The heads of a layer share both weights.

Two implementations must agree: `bucketed` (length buckets, any device) and the Triton kernel of `hstu_triton` (CUDA).

Shape letters: T history tokens, C candidates, S = T + C tokens, H heads, K head width, B requests, n requests
of a bucket, W slots per history, J candidates per request of a bucket, P positions.
"""

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F

from gpsd_dist.batch.packing import Bucket, Packing
from gpsd_dist.batch.uncompiled import uncompiled
from gpsd_dist.model.ops.attention import from_slots, to_slots
from gpsd_dist.model.ops.hstu_bias import BiasWeights, BucketPairs, EventTimes, Relations, num_positions, time_bucket

log = logging.getLogger(__name__)


def event_times(history_T: torch.Tensor, request_B: torch.Tensor, packing: Packing) -> EventTimes:
    """Derives the times of queries and keys; int64 seconds with -1 for unknown. No GPU sync."""
    request_T = packing.request_T
    is_last_T = packing.position_S[: packing.num_history_tokens] + 1 == packing.history_offsets.diff()[request_T]
    next_T = torch.where(is_last_T, request_B[request_T], history_T.roll(-1))
    candidate_C = request_B[packing.request_C]
    return EventTimes(torch.cat((next_T, candidate_C)), torch.cat((history_T, candidate_C)))


def has_kernel(x: torch.Tensor) -> bool:
    """Says whether `attend` runs the Triton kernel on such tensors; otherwise it runs `bucketed`."""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    is_found = importlib.util.find_spec("triton") is not None
    if not is_found:
        log.warning("Triton is not installed: HSTU's attention runs in padded length buckets on this GPU")
    return is_found


def relate(packing: Packing, history_T: torch.Tensor, request_B: torch.Tensor, for_kernel: bool) -> Relations:
    """Relates the tokens of a batch for a model with a time bias. Times are int64 seconds, -1 unknown."""
    times = event_times(history_T, request_B, packing)
    if not for_kernel:
        return Relations(packing, times, _pairs(times, packing, history_T, request_B))
    from gpsd_dist.model.ops import hstu_triton  # Triton comes with CUDA builds of torch alone

    return Relations(packing, times, hstu_triton.pair_buckets(times, packing, request_B))


@uncompiled
def _pairs(
    times: EventTimes, packing: Packing, history_T: torch.Tensor, request_B: torch.Tensor
) -> tuple[BucketPairs, ...]:
    """Finds the time buckets of all pairs in each length bucket."""
    sizes = [bucket.num_tokens for bucket in packing.buckets]
    queries = times.query_S[: packing.num_history_tokens].split(sizes)
    requests = request_B.split([bucket.num_requests for bucket in packing.buckets])
    pairs = []
    for bucket, query_t, key_t, request_n in zip(
        packing.device_buckets, queries, history_T.split(sizes), requests, strict=True
    ):
        query_nW, key_nW = (_slots(part, bucket) for part in (query_t, key_t))
        history_nWW = time_bucket(query_nW[:, :, None], key_nW[:, None])
        pairs.append(BucketPairs(history_nWW, time_bucket(request_n[:, None], key_nW)))
    return tuple(pairs)


def _slots(packed_t: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """Pads one bucket: [t] -> [n, W]."""
    if bucket.history is not None:
        packed_t = packed_t.index_select(0, bucket.history.entry)
    return packed_t.view(bucket.num_requests, bucket.width)


def attend(
    qkv_S3HK: torch.Tensor, bias: BiasWeights, relations: Relations, candidates_only: bool = False
) -> torch.Tensor:
    """Computes the attention output [S, H * K] for tokens in packed order, or [C, H * K] with `candidates_only`.

    It divides by P, whatever the length. A candidate attends to its history and itself, which equals K separate causal
    passes.
    """
    packing = relations.packing
    if not (packing.num_candidates or (packing.num_history_tokens and not candidates_only)):
        weights = [weight for weight in (bias.position, bias.time) if weight is not None]
        # There is no query, but DDP still waits for gradients of the bias weights, so they must be in the graph.
        return qkv_S3HK[:0, 0].flatten(1) + sum(weight.sum() * 0.0 for weight in weights)
    if has_kernel(qkv_S3HK):
        from gpsd_dist.model.ops import hstu_triton  # Triton comes with CUDA builds of torch alone

        parts_HK = hstu_triton.attend_to_histories(qkv_S3HK, bias, relations, candidates_only)
    else:
        parts_HK = bucketed(qkv_S3HK, bias, relations, candidates_only)
    if packing.num_candidates:
        own_CHK = _own_part(qkv_S3HK[packing.num_history_tokens :], bias, relations)
        parts_HK[-1] = parts_HK[-1] + own_CHK.flatten(1)
    return torch.cat(parts_HK)


def _own_part(candidate_C3HK: torch.Tensor, bias: BiasWeights, relations: Relations) -> torch.Tensor:
    """Computes what a candidate takes from itself, [C, H, K]."""
    query, key, value = candidate_C3HK.unbind(1)
    positions = num_positions(bias)
    score_CH1 = (query * key).sum(-1, keepdim=True) + bias.position[positions - 1]
    if bias.time is not None:
        request_C = relations.times.key_S[relations.packing.num_history_tokens :]
        score_CH1 = score_CH1 + bias.time[time_bucket(request_C, request_C)][:, None, None]
    return (F.silu(score_CH1) / positions).to(value.dtype) * value


@uncompiled
def bucketed(
    qkv_S3HK: torch.Tensor, bias: BiasWeights, relations: Relations, candidates_only: bool = False
) -> list[torch.Tensor]:
    """Computes what queries take from histories: [T, H * K] of the histories unless `candidates_only`, and [C, H * K]
    of the candidates if there are any. Pads only inside a length bucket.
    """
    packing, pairs = relations.packing, relations.pairs
    buckets = packing.device_buckets
    parts = qkv_S3HK.split([b.num_tokens for b in buckets] + [b.num_candidates for b in buckets])
    history_parts, candidate_parts = [], []
    for index, bucket in enumerate(buckets):
        history_3nHWK = to_slots(parts[index], bucket.history, bucket.num_requests, bucket.width)
        pair = None if pairs is None else pairs[index]
        if bucket.num_tokens and not candidates_only:
            out_nHWK = _history_attends(history_3nHWK, bias, pair)
            history_parts.append(from_slots(out_nHWK, bucket.history))
        if bucket.num_candidates:
            packed = parts[len(buckets) + index]
            candidate_3nHJK = to_slots(packed, bucket.candidate, bucket.num_requests, bucket.max_candidates)
            out_nHJK = _candidates_attend(candidate_3nHJK[0], history_3nHWK, bias, pair, bucket)
            candidate_parts.append(from_slots(out_nHJK, bucket.candidate))
    return [torch.cat(parts) for parts in (history_parts, candidate_parts) if parts]


def _history_attends(history_3nHWK: torch.Tensor, bias: BiasWeights, pair: BucketPairs | None) -> torch.Tensor:
    """Attends from histories to themselves. Padding is to the right of every token, so the causal mask hides it."""
    query, key, value = history_3nHWK.unbind(0)
    slot_W = torch.arange(query.shape[2], device=query.device)
    distance_WW = slot_W[None] - slot_W[:, None]
    score_nHWW = query @ key.transpose(-1, -2) + bias.position[num_positions(bias) - 1 + distance_WW]
    if pair is not None:
        score_nHWW = score_nHWW + bias.time[pair.history_nWW][:, None]
    weight = F.silu(score_nHWW) / num_positions(bias)
    return weight.masked_fill(distance_WW > 0, 0.0).to(value.dtype) @ value


def _candidates_attend(
    query_nHJK: torch.Tensor, history_3nHWK: torch.Tensor, bias: BiasWeights, pair: BucketPairs | None, bucket: Bucket
) -> torch.Tensor:
    _, key, value = history_3nHWK.unbind(0)
    slot_W = torch.arange(bucket.width, device=key.device)
    is_entry = torch.ones_like(slot_W, dtype=torch.bool)[None] if bucket.history is None else bucket.history.is_entry
    bias_nW = bias.position[num_positions(bias) - 1 + slot_W - is_entry.sum(-1, keepdim=True)]
    if pair is not None:
        bias_nW = bias_nW + bias.time[pair.candidate_nW]
    weight_nHJW = F.silu(query_nHJK @ key.transpose(-1, -2) + bias_nW[:, None, None]) / num_positions(bias)
    return weight_nHJW.masked_fill(~is_entry[:, None, None], 0.0).to(value.dtype) @ value
