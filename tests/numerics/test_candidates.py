"""K candidates share one pass over the history and get what K separate passes would give (float64; tolerance as in
test_tower.py: the rotation is float32)."""

import numpy as np
import pytest
import torch

from gpsd_dist.batch import packing as packing_module
from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.ops.attention import attend
from gpsd_dist.model.transformer import Transformer
from tests.helpers import reference

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LAYERS, WIDTH, HEADS = 2, 16, 2


@pytest.fixture(scope="module")
def tower():
    return reference.fill_(Transformer(ModelConfig(layers=LAYERS, width=WIDTH, heads=HEADS), 1).double())


def make_rows(lengths, counts, seed=0):
    random = torch.Generator().manual_seed(seed)
    draw = [[torch.randn(n, WIDTH, dtype=torch.float64, generator=random) for n in part] for part in (lengths, counts)]
    return draw[0], draw[1]


def run_packed(tower, history, candidates):
    lengths, counts = (np.array([len(row) for row in rows], np.int64) for rows in (history, candidates))
    return tower(torch.cat([*history, *candidates]), Packing.from_lengths(lengths, counts))


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([5], [1]),
        ([5], [4]),
        ([0], [3]),
        ([0, 0, 0], [1, 2, 3]),
        ([0, 0, 3, 8, 8], [2, 1, 4, 1, 3]),
        ([4, 4, 4], [2, 2, 2]),
        ([0, 2, 8, 9, 13, 13, 20, 28], [3, 1, 2, 4, 1, 5, 2, 1]),
        ([0, 1, 9, 30], [0, 2, 0, 1]),
        ([5], [12]),
        ([0, 2, 8, 9, 30], [9, 12, 1, 10, 9]),
        ([0, 2, 30], [60, 1, 70]),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["rows", "buckets"])
def test_k_candidates_equal_k_passes_forward_and_backward(tower, lengths, counts, layout, monkeypatch):
    if layout == "buckets":
        monkeypatch.setattr(packing_module, "plan_rows", lambda *lengths: None)
    history, candidates = make_rows(lengths, counts)
    leaves = [row.requires_grad_() for row in (*history, *candidates) if len(row)]
    packed = run_packed(tower, history, candidates)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in tower.named_parameters()}
    expected = reference.histories_and_candidates(history, candidates, weights, layers=LAYERS, heads=HEADS)
    torch.testing.assert_close(packed, expected, **TOLERANCE)

    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(packed, [*leaves, *tower.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [*leaves, *weights.values()], upstream)
    names = [f"row {i}" for i in range(len(leaves))] + list(weights)
    for name, ours, theirs in zip(names, got, wanted):
        torch.testing.assert_close(ours, theirs, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_candidates_do_not_see_each_other_nor_are_seen(tower):
    history, candidates = make_rows([0, 6, 9], [2, 3, 2])
    before = run_packed(tower, history, candidates)
    candidates[1] = candidates[1].clone()
    candidates[1][1] += 1.0
    changed = (before - run_packed(tower, history, candidates)).abs().amax(-1) > 0
    assert changed.nonzero().flatten().tolist() == [15 + 2 + 1]  # the second candidate of the second request alone


def test_every_candidate_sees_the_whole_own_history_and_no_other(tower):
    lengths, counts = [3, 6, 9], [2, 3, 2]
    history, candidates = make_rows(lengths, counts)
    before = run_packed(tower, history, candidates)[sum(lengths) :]
    for position in range(6):
        other = [row.clone() for row in history]
        other[1][position] += 1.0
        change = (before - run_packed(tower, other, candidates)[sum(lengths) :]).abs().amax(-1)
        assert (change > 1e-6).tolist() == [False] * 2 + [True] * 3 + [False] * 2, position


def test_equal_candidates_get_equal_states(tower):
    """The position of a candidate is the length of its history, whatever its place in the list."""
    history, candidates = make_rows([7], [1])
    states = run_packed(tower, history, [candidates[0].expand(3, -1)])[7:]
    torch.testing.assert_close(states[1:], states[:1].expand(2, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [([], []), ([0, 0], [0, 0]), ([0], [0]), ([0, 0], [2, 1]), ([3, 4], [0, 0]), ([0, 4], [0, 0])],
    ids=str,
)
def test_attention_of_degenerate_batches(lengths, counts):
    packing = Packing.from_lengths(np.array(lengths, np.int64), np.array(counts, np.int64))
    tokens = sum(lengths) + sum(counts)
    qkv = torch.randn(tokens, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    out = attend(qkv, packing)
    assert out.shape == (tokens, 8)
    [gradient] = torch.autograd.grad(out.sum(), qkv)
    assert gradient.shape == qkv.shape and gradient.isfinite().all()
    if not sum(lengths):  # a candidate without history sees itself alone
        torch.testing.assert_close(out, qkv[:, 2].flatten(1))


@pytest.mark.parametrize(("lengths", "counts"), [([], []), ([0, 0], [1, 3]), ([0, 0], [0, 0])], ids=str)
def test_tower_runs_forward_and_backward_without_history(tower, lengths, counts):
    history, candidates = make_rows(lengths, counts)
    x = torch.cat([*history, *candidates, torch.zeros(0, WIDTH, dtype=torch.float64)]).requires_grad_()
    out = tower(x, Packing.from_lengths(np.array(lengths, np.int64), np.array(counts, np.int64)))
    gradients = torch.autograd.grad(out.sum(), [x, *tower.parameters()])
    assert out.shape == x.shape and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("counts", [[2, 1, 4, 1], [0, 0, 0, 0], [9, 12, 1, 10]], ids=str)
def test_candidates_only_gives_the_candidates_of_the_full_pass(tower, counts):
    lengths = [0, 3, 8, 20]
    history, candidates = make_rows(lengths, counts)
    x_SD = torch.cat([*history, *candidates]).requires_grad_()
    packing = Packing.from_lengths(np.array(lengths), np.array(counts))
    full, alone = tower(x_SD, packing)[sum(lengths) :], tower(x_SD, packing, candidates_only=True)
    torch.testing.assert_close(alone, full, rtol=1e-12, atol=1e-12)
    if sum(counts):
        upstream = torch.randn(full.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        wanted, got = (torch.autograd.grad(out, x_SD, upstream, retain_graph=True)[0] for out in (full, alone))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
