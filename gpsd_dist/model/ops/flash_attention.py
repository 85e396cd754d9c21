"""Attends in two flash calls: histories over themselves (causal), candidates over their whole history. A candidate's
attention to itself is added by hand, and both parts are merged into one softmax by log-sum-exp.

torch 2.11 to 2.13 silently drop the gradient of a flash kernel's log-sum-exp, so the backward is written here. Given
the *merged* output and the *merged* log-sum-exp, the ordinary flash backward of a part computes exactly the part's
share of the gradient, because it recovers the weights as exp(score - lse).

torch.compile sees one opaque operator, `gpsd_dist::two_part_attention`. On CUDA it runs torch's variable-length flash
kernel (half precision, sm80 or newer); on CPU torch's flash kernel request by request: slow, for tests (any dtype).

Shape letters: T history tokens, C candidates, S = T + C, R queries (S or C), H heads, K head width, B requests.
"""

import itertools
import typing

import torch
import torch.nn.functional as F

_HEAD_MULTIPLE = 8  # what the CUDA kernel takes
MAX_HEAD_WIDTH = 256


class Spans(typing.NamedTuple):
    """Says which queries meet which keys: those of the same request. Offsets are int64 [B + 1]."""

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    max_queries: int
    max_keys: int
    is_causal: bool


def two_part_attention(
    qkv_S3HK: torch.Tensor,
    history_offsets: torch.Tensor,
    candidate_offsets: torch.Tensor,
    sizes: tuple[int, int, int],
    candidates_only: bool,
) -> torch.Tensor:
    """Maps [S, 3, H, K] in packed order to [S, H, K], or to [C, H, K] of the candidates.

    `sizes`: history tokens T, the longest history, the most candidates of a request. CUDA: bf16 or fp16, K <= 256.
    """
    out_RHK, _ = _two_part(qkv_S3HK, history_offsets, candidate_offsets, *sizes, candidates_only)
    return out_RHK


@torch.library.custom_op("gpsd_dist::two_part_attention", mutates_args=())
def _two_part(
    qkv_S3HK: torch.Tensor,
    history_offsets: torch.Tensor,
    candidate_offsets: torch.Tensor,
    num_history_tokens: int,
    max_history_length: int,
    max_candidates: int,
    candidates_only: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns output [R, H, K], and log-sum-exp [R, H] of each query's whole softmax (float32, or float64)."""
    forward = _cuda_forward if qkv_S3HK.is_cuda else _cpu_forward
    (query_T, key_T, value_T), (query_C, own_key_C, own_value_C) = _parts(qkv_S3HK, num_history_tokens)
    outs, lses = [], []
    if not candidates_only:
        spans = Spans(history_offsets, history_offsets, max_history_length, max_history_length, True)
        out_THK, lse_TH = forward(query_T, key_T, value_T, spans)
        outs, lses = [out_THK], [lse_TH]
    spans = Spans(candidate_offsets, history_offsets, max_candidates, max_history_length, False)
    out_CHK, lse_CH = forward(query_C, key_T, value_T, spans)
    own_score_CH = _own_score(query_C, own_key_C).to(lse_CH.dtype)
    merged_CH = torch.logaddexp(lse_CH, own_score_CH)
    share_CH1, own_share_CH1 = ((part - merged_CH).exp()[..., None] for part in (lse_CH, own_score_CH))
    outs.append((share_CH1 * out_CHK + own_share_CH1 * own_value_C).to(qkv_S3HK.dtype))
    return torch.cat(outs), torch.cat([*lses, merged_CH])


@_two_part.register_fake
def _two_part_shapes(qkv_S3HK, history_offsets, candidate_offsets, num_history_tokens, *sizes_and_candidates_only):
    tokens, _, heads, width = qkv_S3HK.shape
    queries = tokens - num_history_tokens if sizes_and_candidates_only[-1] else tokens
    out_RHK = qkv_S3HK.new_empty(queries, heads, width)
    return out_RHK, qkv_S3HK.new_empty(queries, heads, dtype=_accumulation_dtype(qkv_S3HK.dtype))


@torch.library.custom_op("gpsd_dist::two_part_attention_backward", mutates_args=())
def _two_part_backward(
    grad_RHK: torch.Tensor,
    qkv_S3HK: torch.Tensor,
    out_RHK: torch.Tensor,
    lse_RH: torch.Tensor,
    history_offsets: torch.Tensor,
    candidate_offsets: torch.Tensor,
    num_history_tokens: int,
    max_history_length: int,
    max_candidates: int,
    candidates_only: bool,
) -> torch.Tensor:
    """Returns the gradient of `qkv_S3HK`."""
    backward = _cuda_backward if qkv_S3HK.is_cuda else _cpu_backward
    num_own = 0 if candidates_only else num_history_tokens
    grad_S3HK = torch.zeros_like(qkv_S3HK)
    (query_T, key_T, value_T), (query_C, own_key_C, own_value_C) = _parts(qkv_S3HK, num_history_tokens)
    grad_history, (grad_query_C, grad_own_key_C, grad_own_value_C) = _parts(grad_S3HK, num_history_tokens)

    grad_CHK, out_CHK, lse_CH = (part[num_own:].contiguous() for part in (grad_RHK, out_RHK, lse_RH))
    spans = Spans(candidate_offsets, history_offsets, max_candidates, max_history_length, False)
    from_history = backward(grad_CHK, query_C, key_T, value_T, out_CHK, lse_CH, spans)
    own_share_CH1 = (_own_score(query_C, own_key_C).to(lse_CH.dtype) - lse_CH).exp()[..., None]
    wide_grad_CHK = grad_CHK.to(lse_CH.dtype)
    above_mean_CH1 = (wide_grad_CHK * (own_value_C - out_CHK)).sum(-1, keepdim=True)
    grad_score_CH1 = own_share_CH1 * above_mean_CH1 * _scale(query_C)
    grad_query_C.copy_(from_history[0] + grad_score_CH1 * own_key_C)
    grad_own_key_C.copy_(grad_score_CH1 * query_C)
    grad_own_value_C.copy_(own_share_CH1 * wide_grad_CHK)
    for target, part in zip(grad_history[1:], from_history[1:], strict=True):
        target.copy_(part)
    if not candidates_only:
        grad_THK, out_THK, lse_TH = (part[:num_own].contiguous() for part in (grad_RHK, out_RHK, lse_RH))
        spans = Spans(history_offsets, history_offsets, max_history_length, max_history_length, True)
        from_own = backward(grad_THK, query_T, key_T, value_T, out_THK, lse_TH, spans)
        for target, part in zip(grad_history, from_own, strict=True):
            target.add_(part)
    return grad_S3HK


@_two_part_backward.register_fake
def _two_part_backward_shapes(grad_RHK, qkv_S3HK, *rest):
    return torch.empty_like(qkv_S3HK)


def _keep(ctx, inputs, output) -> None:
    qkv_S3HK, history_offsets, candidate_offsets, *ctx.sizes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv_S3HK, *output, history_offsets, candidate_offsets)


def _differentiate(ctx, grad_RHK, grad_lse_RH):
    qkv_S3HK, out_RHK, lse_RH, *offsets = ctx.saved_tensors
    grad_S3HK = _two_part_backward(grad_RHK, qkv_S3HK, out_RHK, lse_RH, *offsets, *ctx.sizes)
    return grad_S3HK, *[None] * 6


_two_part.register_autograd(_differentiate, setup_context=_keep)


def _parts(
    qkv_S3HK: torch.Tensor, num_history_tokens: int
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Returns views (query, key, value) of the histories, and of the candidates."""
    return qkv_S3HK[:num_history_tokens].unbind(1), qkv_S3HK[num_history_tokens:].unbind(1)


def _scale(query: torch.Tensor) -> float:
    return float(query.shape[-1] ** -0.5)


def _own_score(query_CHK: torch.Tensor, own_key_CHK: torch.Tensor) -> torch.Tensor:
    dtype = _accumulation_dtype(query_CHK.dtype)
    return (query_CHK.to(dtype) * own_key_CHK.to(dtype)).sum(-1) * _scale(query_CHK)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cpu_forward(query_RHK, key_THK, value_THK, spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (output [R, H, K], log-sum-exp [R, H]); 0 and -inf for a query without keys."""
    out_RHK = torch.zeros_like(query_RHK, memory_format=torch.contiguous_format)
    lse_RH = query_RHK.new_full(query_RHK.shape[:2], -torch.inf, dtype=_accumulation_dtype(query_RHK.dtype))
    for queries, keys in _pairs(spans):
        parts = (_one_request(part) for part in (query_RHK[queries], key_THK[keys], value_THK[keys]))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, spans.is_causal)
        out_RHK[queries], lse_RH[queries] = out[0].transpose(0, 1), lse[0].transpose(0, 1)
    return out_RHK, lse_RH


def _cpu_backward(grad_RHK, query_RHK, key_THK, value_THK, out_RHK, lse_RH, spans: Spans):
    """Returns gradients of query, key, value; `out_RHK` and `lse_RH` may come from a softmax over more keys."""
    leaves = query_RHK, key_THK, value_THK
    gradients = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in leaves]
    for queries, keys in _pairs(spans):
        inputs = (grad_RHK[queries], query_RHK[queries], key_THK[keys], value_THK[keys], out_RHK[queries])
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_one_request(part) for part in inputs), lse_RH[queries].t()[None], 0.0, spans.is_causal
        )
        for target, rows, part in zip(gradients, (queries, keys, keys), parts, strict=True):
            target[rows] = part[0].transpose(0, 1)
    return gradients


def _pairs(spans: Spans) -> typing.Iterator[tuple[slice, slice]]:
    """Yields the rows of the queries and of the keys of every request that has both."""
    cuts = [itertools.starmap(slice, itertools.pairwise(offsets.tolist())) for offsets in spans[:2]]
    return ((q, k) for q, k in zip(*cuts, strict=True) if q.start < q.stop and k.start < k.stop)


def _one_request(rows_nHK: torch.Tensor) -> torch.Tensor:
    return rows_nHK.transpose(0, 1)[None]


def _cuda_forward(query_RHK, key_THK, value_THK, spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
    """Does what `_cpu_forward` does. The kernel returns lse [H, R], +inf for a query without keys."""
    if not (len(query_RHK) and len(key_THK)):
        lse_RH = query_RHK.new_full(query_RHK.shape[:2], -torch.inf, dtype=torch.float32)
        return torch.zeros_like(query_RHK, memory_format=torch.contiguous_format), lse_RH
    padded = [_padded(part) for part in (query_RHK, key_THK, value_THK)]
    out_RHK, lse_HR, *_ = torch.ops.aten._flash_attention_forward(
        *padded, *_kernel_spans(spans), 0.0, spans.is_causal, False, scale=_scale(query_RHK)
    )
    lse_RH = lse_HR.t()
    return out_RHK[..., : query_RHK.shape[-1]], lse_RH.masked_fill(lse_RH == torch.inf, -torch.inf)


def _cuda_backward(grad_RHK, query_RHK, key_THK, value_THK, out_RHK, lse_RH, spans: Spans):
    """Does what `_cpu_backward` does."""
    if not (len(query_RHK) and len(key_THK)):
        return [torch.zeros_like(part) for part in (query_RHK, key_THK, value_THK)]
    padded = [_padded(part) for part in (grad_RHK, query_RHK, key_THK, value_THK, out_RHK)]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query_RHK.device), query_RHK.new_empty(0)
    options = *_kernel_spans(spans), 0.0, spans.is_causal, *no_dropout
    gradients = torch.ops.aten._flash_attention_backward(
        *padded, lse_RH.t().contiguous(), *options, scale=_scale(query_RHK)
    )
    return [gradient[..., : query_RHK.shape[-1]] for gradient in gradients]


def _padded(rows_RHK: torch.Tensor) -> torch.Tensor:
    """Adds zero columns up to a head width that the kernel takes; they change no score and give zero outputs."""
    missing = -rows_RHK.shape[-1] % _HEAD_MULTIPLE
    return F.pad(rows_RHK, (0, missing)) if missing else rows_RHK


def _kernel_spans(spans: Spans) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return spans.query_offsets.int(), spans.key_offsets.int(), spans.max_queries, spans.max_keys
