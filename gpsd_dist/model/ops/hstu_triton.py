"""Implements HSTU's attention in Triton, with its backward: no padding, no scores in memory.

One kernel serves both kinds of queries: history tokens (causal, over their own history) and candidates (over the whole
history of their request). Time buckets take a byte for each pair: a logarithm that all layers, heads and both passes
share. The reference is `hstu_attention.bucketed`. Bias gradients are sums of atomic adds, so their
last bits vary from run to run. So far it was compiled for sm_90 and run in Triton's interpreter, never on a GPU.

Shape letters: M queries, N keys, H heads, K head width, B requests, P positions.
"""

import typing

import torch
import triton
import triton.language as tl

from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.uncompiled import uncompiled
from gpsd_dist.model.ops.hstu_bias import (
    LOG_STEP,
    UNKNOWN_BUCKET,
    BiasWeights,
    EventTimes,
    PackedBuckets,
    Relations,
    num_positions,
)

_LOG_STEP = tl.constexpr(LOG_STEP)
_UNKNOWN = tl.constexpr(UNKNOWN_BUCKET)
_GRADIENT_COPIES = 64  # of each bias gradient, so that atomic adds spread over addresses
_MIN_DOT_WIDTH = 16  # the smallest that tl.dot takes
_NUM_WARPS = 8
_BUCKET_BLOCK = 32  # rows and columns of time buckets that a program writes at a time
# float32 products by three of TF32: 21 bits of mantissa, on tensor cores. "ieee" takes none, and its products fill the
# registers: the backward for keys then spilt 5.5 - 18 KB per thread.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load_rows(base, row, is_row, head, H: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """Loads a tile [rows, WIDTH] of one head from [*, H, K]; zeros outside."""
    column = tl.arange(0, WIDTH)
    pointer = base + (row[:, None] * H + head) * K + column[None, :]
    return tl.load(pointer, mask=is_row[:, None] & (column < K)[None, :], other=0.0)


@triton.jit
def _store_rows(base, row, is_row, head, tile, H: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    pointer = base + (row[:, None] * H + head) * K + column[None, :]
    tl.store(pointer, tile.to(base.dtype.element_ty), mask=is_row[:, None] & (column < K)[None, :])


@triton.jit
def _place(H: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Returns (request, head, block of the request) of this program.

    Programs start in the order of their numbers, the first axis running fastest. Requests are sorted by length, so they
    are taken from the last one; so are blocks, where a later one has more to do: what takes longest begins first.
    """
    request = tl.num_programs(0) // H - 1 - tl.program_id(0) // H
    block = tl.num_programs(1) - 1 - tl.program_id(1) if LAST_FIRST else tl.program_id(1)
    return request, tl.program_id(0) % H, block


@triton.jit
def _pairs(m, n, num_q, num_k, P, IS_CAUSAL: tl.constexpr):
    """Returns (does the pair attend, index of its position weight). A candidate comes right after its history."""
    is_pair = (m < num_q)[:, None] & (n < num_k)[None, :]
    if IS_CAUSAL:
        is_pair = is_pair & (n[None, :] <= m[:, None])
        position = P - 1 + n[None, :] - m[:, None]
    else:
        position = tl.zeros_like(m)[:, None] + P - 1 + n[None, :] - num_k
    return is_pair, tl.where(is_pair, position, 0)


@triton.jit
def _time_buckets(query_time, key_time):
    """Computes `hstu_bias.time_bucket`."""
    gap = query_time[:, None] - key_time[None, :]
    gap = tl.where(gap < 0, -gap, gap)
    bucket = tl.log(tl.maximum(gap, 1).to(tl.float32)) / _LOG_STEP
    is_known = (query_time >= 0)[:, None] & (key_time >= 0)[None, :]
    return tl.where(is_known, tl.minimum(bucket.to(tl.int32), _UNKNOWN), _UNKNOWN)


@triton.jit
def _fill_buckets(query_time, key_time, bucket, query_offsets, key_offsets, pair_offsets, BLOCK: tl.constexpr):
    """Writes the bucket of every query of a request with every key of it, row by row from `pair_offsets`."""
    request, block = tl.program_id(0), tl.program_id(1)
    first_q, first_k = tl.load(query_offsets + request), tl.load(key_offsets + request)
    num_q = (tl.load(query_offsets + request + 1) - first_q).to(tl.int32)
    num_k = (tl.load(key_offsets + request + 1) - first_k).to(tl.int32)
    m, first_pair = block * BLOCK + tl.arange(0, BLOCK), tl.load(pair_offsets + request)
    if block * BLOCK < num_q:
        q_time = tl.load(query_time + first_q + m, mask=m < num_q, other=0)
        for start in range(0, num_k, BLOCK):
            n = start + tl.arange(0, BLOCK)
            k_time = tl.load(key_time + first_k + n, mask=n < num_k, other=0)
            place = bucket + first_pair + m[:, None] * num_k + n[None, :]
            is_pair = (m < num_q)[:, None] & (n < num_k)[None, :]
            tl.store(place, _time_buckets(q_time, k_time).to(tl.uint8), mask=is_pair)


@triton.jit
def _load_buckets(bucket, first_pair, m, n, num_k, is_pair, IS_CAUSAL: tl.constexpr):
    """Loads the buckets of a tile. All candidates of a request have its time, and so one row of buckets."""
    row = m * num_k if IS_CAUSAL else tl.zeros_like(m)
    return tl.load(bucket + first_pair + row[:, None] + n[None, :], mask=is_pair, other=0).to(tl.int32)


@triton.jit
def _scores(q, k, position, bucket, is_pair, position_weight, time_weight, HAS_TIME: tl.constexpr):
    """Computes q k + bias in float32, without the bias where no pair attends."""
    score = tl.dot(q, tl.trans(k), input_precision=_PRECISION)
    score += tl.load(position_weight + position, mask=is_pair, other=0.0)
    if HAS_TIME:
        score += tl.load(time_weight + bucket, mask=is_pair, other=0.0)
    return score


@triton.jit
def _forward(
    query, key, value, out, query_offsets, key_offsets, buckets, pair_offsets, position_weight, time_weight, P,
    H: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_TIME: tl.constexpr,
):  # fmt: skip
    request, head, block = _place(H, LAST_FIRST=True)
    first_q, first_k = tl.load(query_offsets + request), tl.load(key_offsets + request)
    num_q = (tl.load(query_offsets + request + 1) - first_q).to(tl.int32)
    num_k = (tl.load(key_offsets + request + 1) - first_k).to(tl.int32)
    m = block * BLOCK + tl.arange(0, BLOCK)
    if block * BLOCK < num_q:
        q = _load_rows(query, first_q + m, m < num_q, head, H, K, WIDTH)
        first_pair = tl.load(pair_offsets + request) if HAS_TIME else first_k
        total = tl.zeros([BLOCK, WIDTH], tl.float32)
        stop = tl.minimum(num_k, (block + 1) * BLOCK) if IS_CAUSAL else num_k
        for start in range(0, stop, BLOCK):
            n = start + tl.arange(0, BLOCK)
            k = _load_rows(key, first_k + n, n < num_k, head, H, K, WIDTH)
            v = _load_rows(value, first_k + n, n < num_k, head, H, K, WIDTH)
            is_pair, position = _pairs(m, n, num_q, num_k, P, IS_CAUSAL)
            bucket = position
            if HAS_TIME:
                bucket = _load_buckets(buckets, first_pair, m, n, num_k, is_pair, IS_CAUSAL)
            score = _scores(q, k, position, bucket, is_pair, position_weight, time_weight, HAS_TIME)
            weight = tl.where(is_pair, score * tl.sigmoid(score) / P, 0.0)
            total += tl.dot(weight.to(v.dtype), v, input_precision=_PRECISION)
        _store_rows(out, first_q + m, m < num_q, head, total, H, K, WIDTH)


@triton.jit
def _weights_and_slopes(score, grad_weight, is_pair, P):
    """Returns the weight SiLU(score) / P, and the gradient of the score given that of the weight."""
    gate = tl.sigmoid(score)
    weight = tl.where(is_pair, score * gate / P, 0.0)
    return weight, tl.where(is_pair, grad_weight * gate * (1 + score * (1 - gate)) / P, 0.0)


@triton.jit
def _backward_queries(
    query, key, value, grad_out, grad_query, query_offsets, key_offsets, buckets, pair_offsets, position_weight,
    time_weight, grad_position, grad_time, P, NUM_TIME, COPIES: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_TIME: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of a block of queries, and adds its pairs to the gradients of the bias weights."""
    request, head, block = _place(H, LAST_FIRST=True)
    first_q, first_k = tl.load(query_offsets + request), tl.load(key_offsets + request)
    num_q = (tl.load(query_offsets + request + 1) - first_q).to(tl.int32)
    num_k = (tl.load(key_offsets + request + 1) - first_k).to(tl.int32)
    m = block * BLOCK + tl.arange(0, BLOCK)
    copy = (block + tl.program_id(0)) % COPIES
    if block * BLOCK < num_q:
        q = _load_rows(query, first_q + m, m < num_q, head, H, K, WIDTH)
        g = _load_rows(grad_out, first_q + m, m < num_q, head, H, K, WIDTH)
        first_pair = tl.load(pair_offsets + request) if HAS_TIME else first_k
        total = tl.zeros([BLOCK, WIDTH], tl.float32)
        stop = tl.minimum(num_k, (block + 1) * BLOCK) if IS_CAUSAL else num_k
        for start in range(0, stop, BLOCK):
            n = start + tl.arange(0, BLOCK)
            k = _load_rows(key, first_k + n, n < num_k, head, H, K, WIDTH)
            v = _load_rows(value, first_k + n, n < num_k, head, H, K, WIDTH)
            is_pair, position = _pairs(m, n, num_q, num_k, P, IS_CAUSAL)
            bucket = position
            if HAS_TIME:
                bucket = _load_buckets(buckets, first_pair, m, n, num_k, is_pair, IS_CAUSAL)
            score = _scores(q, k, position, bucket, is_pair, position_weight, time_weight, HAS_TIME)
            grad_weight = tl.dot(g, tl.trans(v), input_precision=_PRECISION)
            _, slope = _weights_and_slopes(score, grad_weight, is_pair, P)
            total += tl.dot(slope.to(k.dtype), k, input_precision=_PRECISION)
            tl.atomic_add(grad_position + copy * (2 * P - 1) + position, slope, mask=is_pair)
            if HAS_TIME:
                tl.atomic_add(grad_time + copy * NUM_TIME + bucket, slope, mask=is_pair)
        _store_rows(grad_query, first_q + m, m < num_q, head, total, H, K, WIDTH)


@triton.jit
def _backward_keys(
    query, key, value, grad_out, grad_key, grad_value, query_offsets, key_offsets, buckets, pair_offsets,
    position_weight, time_weight, P,
    H: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_TIME: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a block of keys and values, over all queries that see it."""
    request, head, block = _place(H, LAST_FIRST=False)
    first_q, first_k = tl.load(query_offsets + request), tl.load(key_offsets + request)
    num_q = (tl.load(query_offsets + request + 1) - first_q).to(tl.int32)
    num_k = (tl.load(key_offsets + request + 1) - first_k).to(tl.int32)
    n = block * BLOCK + tl.arange(0, BLOCK)
    if block * BLOCK < num_k:
        k = _load_rows(key, first_k + n, n < num_k, head, H, K, WIDTH)
        v = _load_rows(value, first_k + n, n < num_k, head, H, K, WIDTH)
        first_pair = tl.load(pair_offsets + request) if HAS_TIME else first_k
        total_k, total_v = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
        begin = block * BLOCK if IS_CAUSAL else 0
        for start in range(begin, num_q, BLOCK):
            m = start + tl.arange(0, BLOCK)
            q = _load_rows(query, first_q + m, m < num_q, head, H, K, WIDTH)
            g = _load_rows(grad_out, first_q + m, m < num_q, head, H, K, WIDTH)
            is_pair, position = _pairs(m, n, num_q, num_k, P, IS_CAUSAL)
            bucket = position
            if HAS_TIME:
                bucket = _load_buckets(buckets, first_pair, m, n, num_k, is_pair, IS_CAUSAL)
            score = _scores(q, k, position, bucket, is_pair, position_weight, time_weight, HAS_TIME)
            grad_weight = tl.dot(g, tl.trans(v), input_precision=_PRECISION)
            weight, slope = _weights_and_slopes(score, grad_weight, is_pair, P)
            total_k += tl.dot(tl.trans(slope).to(q.dtype), q, input_precision=_PRECISION)
            total_v += tl.dot(tl.trans(weight).to(g.dtype), g, input_precision=_PRECISION)
        _store_rows(grad_key, first_k + n, n < num_k, head, total_k, H, K, WIDTH)
        _store_rows(grad_value, first_k + n, n < num_k, head, total_v, H, K, WIDTH)


class Segments(typing.NamedTuple):
    """Says which queries meet which keys: those of the same request. Offsets are int64 [B + 1]."""

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    buckets: torch.Tensor | None  # uint8, from `pair_buckets`; None without a time bias
    pair_offsets: torch.Tensor | None  # int64 [B]: first bucket of each request
    max_queries: int  # of a request
    max_keys: int
    is_causal: bool  # queries and keys are the same tokens; else queries come after all keys of their request


class _Attention(torch.autograd.Function):
    """Maps query [M, H, K], key and value [N, H, K] and the bias weights to out [M, H, K]."""

    @staticmethod
    def forward(ctx, query, key, value, position_weight, time_weight, segments):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        weights = [w if w is None else w.detach().float().contiguous() for w in (position_weight, time_weight)]
        out = torch.empty_like(query)
        options = _options(query, weights, segments)
        _forward[_grid(segments.max_queries, query, segments)](
            query, key, value, out, *_pointers(weights, segments), **options
        )
        ctx.save_for_backward(query, key, value)
        ctx.weights, ctx.segments, ctx.options = weights, segments, options
        ctx.dtypes = [w if w is None else w.dtype for w in (position_weight, time_weight)]
        return out

    @staticmethod
    def backward(ctx, grad_out):
        (query, key, value), weights, segments = ctx.saved_tensors, ctx.weights, ctx.segments
        grad_out = grad_out.to(query.dtype).contiguous()
        grad_query, grad_key, grad_value = (torch.empty_like(part) for part in (query, key, value))
        copies = [None if w is None else w.new_zeros(_GRADIENT_COPIES, len(w)) for w in weights]
        pointers = _pointers(weights, segments)
        *pointers_without_p, positions = pointers
        grad_time, num_time = (copies[0], 0) if copies[1] is None else (copies[1], len(weights[1]))
        _backward_queries[_grid(segments.max_queries, query, segments)](
            query, key, value, grad_out, grad_query, *pointers_without_p, copies[0], grad_time, positions, num_time,
            COPIES=_GRADIENT_COPIES, **ctx.options,
        )  # fmt: skip
        _backward_keys[_grid(segments.max_keys, query, segments)](
            query, key, value, grad_out, grad_key, grad_value, *pointers, **ctx.options
        )
        sums = [None if c is None else c.sum(0).to(dtype) for c, dtype in zip(copies, ctx.dtypes, strict=True)]
        return grad_query, grad_key, grad_value, *sums, None


def _grid(longest: int, query: torch.Tensor, segments: Segments) -> tuple[int, int]:
    num_requests, heads = len(segments.query_offsets) - 1, query.shape[1]
    return num_requests * heads, max(1, triton.cdiv(longest, _block(query)))  # CUDA takes 65,535 along the second axis


def _width(query: torch.Tensor) -> int:
    """Returns the channels of a tile."""
    return max(_MIN_DOT_WIDTH, triton.next_power_of_2(query.shape[2]))


def _block(query: torch.Tensor) -> int:
    """Returns the rows of a tile."""
    size = query.element_size()
    return min(64, max(_MIN_DOT_WIDTH, _tile_bytes(size, _generation(query)) // (_width(query) * size)))


def _tile_bytes(element_bytes: int, generation: int) -> int:
    """Returns the bytes of a tile, chosen by what the compiler says of spills (tests/cuda_compile), not yet by time."""
    if element_bytes == 4:
        return 8192  # 16 KiB spill 1 - 7 KB a thread
    return 16384 if generation >= 9 else 4096  # before Hopper, products take their operands from registers


def _generation(query: torch.Tensor) -> int:
    """Returns the first number of the GPU's compute capability: 8 for A100, 9 for H100 and H200."""
    return torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9


def _options(query: torch.Tensor, weights: list, segments: Segments) -> dict[str, typing.Any]:
    sizes = {"H": query.shape[1], "K": query.shape[2], "WIDTH": _width(query), "BLOCK": _block(query)}
    return sizes | {"IS_CAUSAL": segments.is_causal, "HAS_TIME": weights[1] is not None, "num_warps": _NUM_WARPS}


def _pointers(weights: list, segments: Segments) -> tuple:
    """Returns the arguments that all kernels share; without a time bias, any tensor stands in for unread buckets."""
    position, time = weights
    offsets = segments.query_offsets, segments.key_offsets
    buckets = offsets if time is None else (segments.buckets, segments.pair_offsets)
    return *offsets, *buckets, position, position if time is None else time, (len(position) + 1) // 2


@uncompiled
def pair_buckets(times: EventTimes, packing: Packing, request_B: torch.Tensor) -> PackedBuckets:
    """Computes the time buckets of a batch: those of its histories, and those of the request with each event."""
    offsets, num_tokens, key_time = packing.history_offsets, packing.num_history_tokens, times.key_S
    length_B = offsets.diff()
    pair_offsets = torch.nn.functional.pad((length_B * length_B).cumsum(0), (1, 0))
    num_pairs = int((packing.history_length_B**2).sum())  # known to the host, so that it need not wait for the GPU
    history, candidate = (key_time.new_empty(size, dtype=torch.uint8) for size in (num_pairs, num_tokens))
    if num_tokens:
        blocks = triton.cdiv(packing.max_history_length, _BUCKET_BLOCK)
        arguments = times.query_S, key_time, history, offsets, offsets, pair_offsets
        _fill_buckets[(packing.num_requests, blocks)](*arguments, BLOCK=_BUCKET_BLOCK)
        request = torch.arange(packing.num_requests + 1, device=offsets.device)
        _fill_buckets[(packing.num_requests, 1)](
            request_B.contiguous(), key_time, candidate, request, offsets, offsets, BLOCK=_BUCKET_BLOCK
        )
    return PackedBuckets(history, pair_offsets, candidate)


def attend_to_histories(
    qkv_S3HK: torch.Tensor, bias: BiasWeights, relations: Relations, candidates_only: bool = False
) -> list[torch.Tensor]:
    """Returns the parts that `hstu_attention.bucketed` returns."""
    packing, pairs = relations.packing, relations.pairs
    assert num_positions(bias) > packing.max_history_length, "positions outside the bias table"
    query, key, value = qkv_S3HK.unbind(1)
    num_tokens, offsets, longest = packing.num_history_tokens, packing.history_offsets, packing.max_history_length
    history = key[:num_tokens], value[:num_tokens], bias.position, bias.time
    outputs = []
    if num_tokens and not candidates_only:
        buckets = (None, None) if pairs is None else (pairs.history, pairs.history_offsets)
        segments = Segments(offsets, offsets, *buckets, longest, longest, is_causal=True)
        outputs.append(_Attention.apply(query[:num_tokens], *history, segments).flatten(1))
    if packing.num_candidates:
        buckets = (None, None) if pairs is None else (pairs.candidate, offsets)
        sizes = packing.max_candidates, longest
        segments = Segments(packing.candidate_offsets, offsets, *buckets, *sizes, is_causal=False)
        outputs.append(_Attention.apply(query[num_tokens:], *history, segments).flatten(1))
    return outputs
