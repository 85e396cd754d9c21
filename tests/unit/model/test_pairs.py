import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsd_dist.batch.packing import Packing
from gpsd_dist.model.dien import time_major
from gpsd_dist.model.pairs import pair_up, pool, softmax, split_tokens, sum_histories

REQUESTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=12)


def plan(requests):
    lengths, counts = np.array(sorted(requests), np.int64).reshape(-1, 2).T
    return lengths, counts, Packing.from_lengths(lengths, counts)


@settings(max_examples=50, deadline=None)
@given(requests=REQUESTS)
def test_pairs_are_every_candidate_with_every_token_of_its_history(requests):
    lengths, counts, packing = plan(requests)
    starts = np.cumsum(lengths) - lengths
    owners = [request for request, count in enumerate(counts) for _ in range(count)]
    expected = [(c, starts[r] + t) for c, r in enumerate(owners) for t in range(lengths[r])]
    pairs = pair_up(packing)
    assert list(zip(pairs.candidate_P.tolist(), pairs.token_P.tolist())) == expected
    assert pairs.offsets.diff().tolist() == [lengths[r] for r in owners]
    assert packing.request_T.tolist() == [r for r, length in enumerate(lengths) for _ in range(length)]


def example():
    packing = Packing.from_lengths(np.array([0, 2, 3]), np.array([1, 2, 1]))
    return packing, pair_up(packing)


def test_softmax_is_taken_over_each_candidates_history():
    _, pairs = example()
    score = torch.tensor([1.0, 3.0, -2.0, 500.0, 0.0, 1000.0, 998.0], requires_grad=True)
    parts = [score[0:2], score[2:4], score[4:7]]
    expected = torch.cat([part.softmax(0) for part in parts])
    got = softmax(score, pairs)
    torch.testing.assert_close(got, expected)
    upstream = torch.arange(7.0)
    [ours], [theirs] = (torch.autograd.grad(out, score, upstream) for out in (got, expected))
    torch.testing.assert_close(ours, theirs)
    assert softmax(score.detach().bfloat16(), pairs).dtype == torch.float32
    assert softmax(score.detach().double(), pairs).dtype == torch.float64


def test_pooling_weighs_the_tokens_and_is_zero_without_history():
    _, pairs = example()
    value = torch.arange(10.0, dtype=torch.float64).view(5, 2).requires_grad_()
    weight = torch.tensor([1.0, 2, 3, 4, 5, 6, 7], dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [
            torch.zeros(2, dtype=torch.float64),
            weight[0] * value[0] + weight[1] * value[1],
            weight[2] * value[0] + weight[3] * value[1],
            weight[4] * value[2] + weight[5] * value[3] + weight[6] * value[4],
        ]
    )
    got = pool(value, weight, pairs)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(*(torch.autograd.grad(out, (value, weight), upstream) for out in (got, expected))):
        torch.testing.assert_close(ours, theirs)


def test_sums_of_histories():
    packing, _ = example()
    x = torch.arange(10.0).view(5, 2)
    expected = torch.stack([torch.zeros(2), x[:2].sum(0), x[2:].sum(0)])
    torch.testing.assert_close(sum_histories(x, packing), expected)
    torch.testing.assert_close(sum_histories(x[:, None], packing), expected[:, None])


def test_splitting_needs_candidates_only():
    packing, _ = example()
    x = torch.randn(9, 2, 3)
    history, candidate = split_tokens(x, packing, candidates_only=True)
    assert torch.equal(history, x[:5]) and torch.equal(candidate, x[5:])
    with pytest.raises(ValueError, match="candidates_only"):
        split_tokens(x, packing, candidates_only=False)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), max_size=12))
def test_time_major_has_every_entry_once_and_the_longest_rows_first(lengths):
    lengths = np.array(sorted(lengths), np.int64)
    order = time_major(lengths, torch.from_numpy(lengths))
    expected = [
        (row, step)
        for step in range(max(lengths, default=0))
        for row in reversed(range(len(lengths)))
        if lengths[row] > step
    ]
    assert list(zip(order.row_N.tolist(), order.step_N.tolist())) == expected
    alive = [sum(length > step for length in lengths) for step in range(max(lengths, default=0))]
    assert order.alive_L.tolist() == (alive or [0])
