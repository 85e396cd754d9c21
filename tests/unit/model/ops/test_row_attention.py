"""Attention in shared rows, float64: values against attention in length buckets, gradients also against differences."""

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.model.ops.attention import bucketed
from gpsd_dist.model.ops.row_attention import in_rows

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def plan(lengths, counts):
    return Packing.from_lengths(np.array(lengths, np.int64), np.array(counts, np.int64))


def random_qkv(packing, heads=2, head_width=4):
    tokens = packing.num_history_tokens + packing.num_candidates
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 3, heads, head_width, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("candidates_only", [False, True])
@pytest.mark.parametrize(
    "lengths, counts, num_blocks",
    [
        ([0, 1, 3, 7, 12], [1, 2, 0, 1, 3], 1),
        ([2, 5, 34, 40, 41, 70], [1, 1, 1, 2, 0, 1], 4),
    ],
)
def test_rows_equal_buckets_forward_and_backward(lengths, counts, num_blocks, candidates_only):
    packing = plan(lengths, counts)
    assert len(packing.rows.blocks) == num_blocks
    qkv = random_qkv(packing)
    ours = in_rows(qkv, packing.rows)[packing.num_history_tokens if candidates_only else 0 :]
    theirs = bucketed(qkv, packing, candidates_only)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    (got,), (wanted,) = (torch.autograd.grad(out, [qkv], upstream) for out in (ours, theirs))
    assert (wanted.abs().amax((0, 2, 3)) > 1e-2).all(), "a gradient of queries, keys or values does not test anything"
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_gradients_in_rows_equal_finite_differences():
    packing = plan([0, 1, 4, 33], [1, 2, 0, 1])
    assert len(packing.rows.blocks) == 2
    qkv = random_qkv(packing, heads=1, head_width=2)
    assert torch.autograd.gradcheck(lambda x: in_rows(x, packing.rows), [qkv], fast_mode=True)
