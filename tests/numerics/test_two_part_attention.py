"""Histories and candidates in two flash calls equal one masked softmax, forward and backward.

CPU: torch's CPU flash kernel behind the same operator, in float64 (tolerance: rounding of another order of sums).
CUDA (marked gpu): the variable-length kernel in bf16 against float64 on the CPU.
"""

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.transfer import to_device
from gpsd_dist.config import ModelConfig
from gpsd_dist.model import transformer
from gpsd_dist.model.ops import flash_attention
from gpsd_dist.model.ops.attention import bucketed, two_part
from gpsd_dist.model.transformer import Transformer
from tests.helpers import reference

SHAPES = [
    ([5], [1]),
    ([0], [3]),
    ([0, 0], [0, 2]),
    ([3, 4], [0, 0]),
    ([0, 2, 8, 9, 13, 13, 20, 28], [3, 1, 2, 4, 1, 0, 2, 1]),
    ([0, 2, 8, 9, 70], [9, 12, 1, 10, 9]),
]
HEADS, HEAD_WIDTH = 2, 4


def make(lengths, counts, dtype=torch.float64, head_width=HEAD_WIDTH):
    packing = Packing.from_lengths(np.array(lengths, np.int64), np.array(counts, np.int64))
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths) + sum(counts), 3, HEADS, head_width, dtype=torch.float64, generator=random)
    return qkv.to(dtype).requires_grad_(), packing


def outputs(attention, qkv, packing, candidates_only):
    """Output and gradient for a fixed upstream gradient."""
    out = attention(qkv, packing, candidates_only)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return out, torch.autograd.grad(out, qkv, upstream.to(out))[0]


@pytest.mark.parametrize("candidates_only", [False, True])
@pytest.mark.parametrize(("lengths", "counts"), SHAPES, ids=str)
def test_two_parts_equal_one_masked_softmax(lengths, counts, candidates_only):
    qkv, packing = make(lengths, counts)
    ours, theirs = (outputs(attention, qkv, packing, candidates_only) for attention in (two_part, bucketed))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("candidates_only", [False, True])
def test_gradient_equals_finite_differences(candidates_only):
    qkv, packing = make([0, 1, 3], [1, 2, 2])
    assert torch.autograd.gradcheck(lambda x: two_part(x, packing, candidates_only), (qkv,))


def test_large_scores_neither_overflow_nor_lose_the_candidate():
    """Scores near 700 leave float32's exponential range; the merge subtracts first."""
    qkv, packing = make([4, 40], [2, 3], torch.float32)
    with torch.no_grad():
        qkv[:, :2] *= 60
    wide = qkv.detach().double().requires_grad_()
    ours, theirs = outputs(two_part, qkv, packing, False), outputs(bucketed, wide, packing, False)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), expected, rtol=1e-3, atol=2e-3)  # of scores with 700 +- 6e-5


def test_k_candidates_equal_k_passes(monkeypatch):
    """The whole tower on two-part attention against separate passes (float64; the rotation is float32)."""
    monkeypatch.setattr(transformer, "attend", two_part)
    tower = reference.fill_(Transformer(ModelConfig(layers=2, width=16, heads=2), 1).double())
    lengths, counts = [0, 2, 9, 13], [3, 1, 0, 12]
    random = torch.Generator().manual_seed(0)
    history, candidates = (
        [torch.randn(n, 16, dtype=torch.float64, generator=random) for n in part] for part in (lengths, counts)
    )
    packed = tower(torch.cat([*history, *candidates]), Packing.from_lengths(np.array(lengths), np.array(counts)))
    weights = {name: value.detach().clone().requires_grad_() for name, value in tower.named_parameters()}
    expected = reference.histories_and_candidates(history, candidates, weights, layers=2, heads=2)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=random)
    got = torch.autograd.grad(packed, list(tower.parameters()), upstream)
    for mine, theirs in zip(got, torch.autograd.grad(expected, list(weights.values()), upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("candidates_only", [False, True])
def test_operator_keeps_its_promises_to_the_compiler(candidates_only):
    """Declared shapes, dtypes and aliasing are the real ones, also with symbolic sizes."""
    qkv, packing = make([0, 2, 9], [3, 1, 2], torch.float32)
    offsets = packing.history_offsets, packing.candidate_offsets
    sizes = packing.num_history_tokens, packing.max_history_length, 3
    torch.library.opcheck(flash_attention._two_part, (qkv, *offsets, *sizes, candidates_only))


@pytest.mark.parametrize("head_width", [50, 64])
def test_cuda_kernels_are_called_as_torch_declares_them(head_width):
    """On tensors without data: arguments are accepted; shapes and types are those that the CPU kernel gives."""
    spans = flash_attention.Spans(torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7]), 3, 4, False)
    query, key, value = (torch.randn(n, HEADS, head_width, dtype=torch.bfloat16) for n in (5, 7, 7))
    on_cpu = flash_attention._cpu_forward(query, key, value, spans)
    bare = [part.to("meta") for part in (query, key, value)]
    meta_spans = spans._replace(query_offsets=spans.query_offsets.to("meta"), key_offsets=spans.key_offsets.to("meta"))
    without_data = flash_attention._cuda_forward(*bare, meta_spans)
    pairs = list(zip(without_data, on_cpu, strict=True))
    gradients = flash_attention._cuda_backward(bare[0], *bare, *without_data, meta_spans)
    pairs += zip(gradients, flash_attention._cpu_backward(query, query, key, value, *on_cpu, spans), strict=True)
    for mine, expected in pairs:
        assert mine.shape == expected.shape and mine.dtype == expected.dtype


@pytest.mark.gpu
@pytest.mark.parametrize("candidates_only", [False, True])
@pytest.mark.parametrize("head_width", [16, 50, 64, 256])
@pytest.mark.parametrize(("lengths", "counts"), [*SHAPES, ([0, 200, 1000, 4096], [1, 64, 200, 3])], ids=str)
def test_cuda_kernel_equals_float64(lengths, counts, head_width, candidates_only):
    """bf16 keeps 8 bits: outputs are averages of unit normals, gradients sums of up to 200 such terms."""
    qkv, packing = make(lengths, counts, torch.bfloat16, head_width)
    expected = outputs(bucketed, qkv.detach().double().requires_grad_(), packing, candidates_only)
    on_device = to_device(packing, torch.device("cuda", 0))
    ours = outputs(two_part, qkv.detach().cuda().requires_grad_(), on_device, candidates_only)
    for mine, theirs in zip(ours, expected, strict=True):
        error = (mine.double().cpu() - theirs).norm() / theirs.norm().clamp(min=1e-9)
        assert error < 2e-2, float(error)
