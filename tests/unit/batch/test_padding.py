"""Padded geometry: few shapes, and the same numbers for the real tokens."""

import itertools
import types

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.padding import pad_packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.data.micro_batch import with_targets
from gpsd_dist.data.negatives import group_offsets
from gpsd_dist.model import transformer
from gpsd_dist.model.ops.attention import two_part
from gpsd_dist.model.transformer import Transformer
from tests.helpers import reference

LONGEST = 12
requests = st.lists(st.tuples(st.integers(0, LONGEST), st.integers(0, 5)), max_size=20)


def make(pairs) -> Packing:
    lengths, counts = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
    return Packing.from_lengths(lengths, counts)


@settings(max_examples=80, deadline=None)
@given(pairs=requests, multiple=st.integers(1, 40))
def test_sizes_are_multiples_and_every_real_token_keeps_its_request_and_position(pairs, multiple):
    packing = make(pairs)
    padding = pad_packing(packing, multiple, LONGEST)
    padded = padding.packing
    assert padded.num_history_tokens % multiple == padded.num_candidates % multiple == padded.num_requests % 64 == 0
    assert padded.num_history_tokens - packing.num_history_tokens < multiple
    assert padded.num_candidates - packing.num_candidates < multiple
    assert padded.max_history_length == LONGEST and padded.history_length_B.max(initial=0) <= LONGEST
    assert padded.max_candidates >= padded.candidate_count_B.max(initial=0)
    place = padding.place_S.numpy()
    assert len(np.unique(place)) == len(place)
    assert torch.equal(padded.position_S[padding.place_S], packing.position_S)
    # tokens of one request stay together, and with their candidates
    ends = padded.history_offsets.numpy()[1:]
    request_T = np.searchsorted(ends, place[: packing.num_history_tokens], side="right")
    starts = np.unique(request_T, return_index=True)[1]
    lengths = packing.history_length_B
    assert np.array_equal(np.diff(np.append(np.sort(starts), len(request_T))), lengths[lengths > 0])
    of_candidate = padded.request_C.numpy()[padding.place_C.numpy()]
    assert np.array_equal(padded.history_length_B[of_candidate], lengths[packing.request_C.numpy()])


@pytest.mark.parametrize("candidates_only", [False, True])
@pytest.mark.parametrize("pairs", [[(5, 2), (0, 1), (9, 3), (12, 1)], [(3, 0), (7, 0)], [(0, 2)], []], ids=str)
def test_padded_tower_gives_real_tokens_the_same_states_and_gradients(pairs, candidates_only):
    packing = make(pairs)
    padding = pad_packing(packing, 16, LONGEST)
    tower = reference.fill_(Transformer(ModelConfig(layers=2, width=16, heads=2), 1).double())
    random = torch.Generator().manual_seed(0)
    x_SD = torch.randn(len(packing.position_S), 16, dtype=torch.float64, generator=random).requires_grad_()
    plain = tower(x_SD, packing, candidates_only)
    padded = padding.take(tower(padding.fill(x_SD), padding.packing, candidates_only), candidates_only)
    torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(plain.shape, dtype=torch.float64, generator=random)
    leaves = [x_SD, *tower.parameters()]
    gradients = (torch.autograd.grad(out, leaves, upstream, materialize_grads=True) for out in (padded, plain))
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_compiled_tower_meets_one_shape_where_batches_differ(monkeypatch):
    """As on CUDA: with flash attention. Without padding every batch would be compiled anew."""
    monkeypatch.setattr(transformer, "attend", two_part)
    tower = Transformer(ModelConfig(layers=1, width=16, heads=2), 1)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tower.forward, dynamic=False, backend=backend)
    try:
        for seed in range(4):
            random = np.random.default_rng(seed)
            pairs = [(int(n), 2) for n in random.integers(1, LONGEST + 1, 12)]  # 60 to 100 tokens, 24 candidates
            padding = pad_packing(make(pairs), 128, LONGEST)
            x_SD = torch.randn(padding.place_S.shape[0], 16)
            out = padding.take(compiled(padding.fill(x_SD), padding.packing, True), True)
            torch.testing.assert_close(out, tower(x_SD, make(pairs), True), rtol=1e-4, atol=1e-5)
        assert len(graphs) == 1
    finally:
        torch._dynamo.reset()


@settings(max_examples=80, deadline=None)
@given(pairs=requests, num_groups=st.integers(1, 7), data=st.data())
def test_every_target_keeps_its_token_and_its_group(pairs, num_groups, data):
    packing = make(pairs)
    num_tokens = packing.num_history_tokens
    token_M = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    assume(len(token_M))
    padded = pad_packing(packing, 16, LONGEST)
    cuts = group_offsets("group", token_M, packing, num_groups)
    wanted = types.SimpleNamespace(token_M=torch.from_numpy(token_M), group_offsets=cuts)
    targets = with_targets(padded, wanted).targets
    is_real, source = targets.is_real_M.numpy(), targets.source_M.numpy()
    assert np.array_equal(source[is_real], np.arange(len(token_M)))
    assert np.array_equal(targets.token_M.numpy()[is_real], padded.place_S.numpy()[token_M])
    assert len(is_real) == targets.group_offsets[-1] and len(set(np.diff(targets.group_offsets))) == 1
    for group, (start, stop) in enumerate(itertools.pairwise(targets.group_offsets)):
        assert np.array_equal(source[start:stop][is_real[start:stop]], np.arange(cuts[group], cuts[group + 1]))
