"""The packed click models against loops over candidates and tokens (float64, so agreement is to rounding)."""

import unittest.mock

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.config.model import MODELS
from gpsd_dist.model import wukong
from gpsd_dist.model.registry import TOWERS
from tests.helpers import reference_ctr
from tests.helpers.reference import fill_

TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}
FIELDS, WIDTH = 3, 8
NAMES = sorted(reference_ctr.STATES)
SUPERVISED = [name for name in NAMES if MODELS[name].supervises_history]
LENGTHS, COUNTS = [0, 0, 1, 3, 3, 8, 9, 13], [2, 0, 1, 3, 2, 1, 0, 2]


def make_tower(name, dropout=0.0):
    config = ModelConfig(name=name, layers=2, width=WIDTH, heads=2, max_positions=15, dropout=dropout)
    with unittest.mock.patch.object(wukong, "_FM_HIDDEN", 24):  # 512 takes seconds in float64
        return fill_(TOWERS[name](config, FIELDS).double())


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tower(name):
    return make_tower(name)


def make_rows(lengths, counts, seed=0):
    """Fields of every history and of every request's candidates: lists of [l, F, D] and [k, F, D]."""
    random = torch.Generator().manual_seed(seed)

    def draw(number):
        return torch.randn(number, FIELDS, WIDTH, dtype=torch.float64, generator=random)

    return [draw(n) for n in lengths], [draw(n) for n in counts]


def run(tower, histories, candidates, **options):
    lengths, counts = (np.array([len(row) for row in rows], np.int64) for rows in (histories, candidates))
    x = torch.cat([*histories, *candidates, torch.zeros(0, FIELDS, WIDTH, dtype=torch.float64)])
    return tower(x, Packing.from_lengths(lengths, counts), candidates_only=True, **options)


def parameters_of(tower):
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize(
    ("lengths", "counts"), [([4], [1]), ([0, 0], [2, 1]), ([2, 5], [3, 2]), (LENGTHS, COUNTS)], ids=str
)
def test_forward_and_gradients_equal_the_loops(name, tower, lengths, counts):
    histories, candidates = make_rows(lengths, counts)
    leaves = [row.requires_grad_() for row in (*histories, *candidates) if len(row)]
    states = run(tower, histories, candidates)
    weights = parameters_of(tower)
    expected = torch.stack(
        [
            reference_ctr.STATES[name](history, candidate, weights)
            for history, row in zip(histories, candidates)
            for candidate in row
        ]
    )
    assert states.shape == expected.shape == (sum(counts), tower.out_width)
    torch.testing.assert_close(states, expected, **TOLERANCE)

    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(
        states, [*leaves, *tower.parameters()], upstream, allow_unused=True, materialize_grads=True
    )
    wanted = torch.autograd.grad(
        expected, [*leaves, *weights.values()], upstream, allow_unused=True, materialize_grads=True
    )
    names = [f"row {i}" for i in range(len(leaves))] + list(weights)
    for key, ours, theirs in zip(names, got, wanted):
        assert lengths != LENGTHS or theirs.abs().max() > 1e-7 or "row" in key, f"the gradient of {key} tests nothing"
        torch.testing.assert_close(ours, theirs, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")


def test_k_candidates_equal_k_passes_forward_and_backward(tower):
    histories, candidates = make_rows(LENGTHS, COUNTS)
    leaves = [row.requires_grad_() for row in (*histories, *candidates) if len(row)]
    together = run(tower, histories, candidates)
    alone = torch.cat(
        [run(tower, [history], [candidate[None]]) for history, row in zip(histories, candidates) for candidate in row]
    )
    torch.testing.assert_close(together, alone, **TOLERANCE)
    upstream = torch.randn(alone.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [*leaves, *tower.parameters()]
    got, wanted = (
        torch.autograd.grad(out, inputs, upstream, allow_unused=True, materialize_grads=True)
        for out in (together, alone)
    )
    for ours, theirs in zip(got, wanted):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_candidates_do_not_see_each_other(tower):
    histories, candidates = make_rows([0, 6, 9], [2, 3, 2])
    before = run(tower, histories, candidates)
    candidates[1][1] += 1.0
    changed = (before - run(tower, histories, candidates)).abs().amax(-1) > 1e-9
    assert changed.nonzero().flatten().tolist() == [3]


def test_candidates_see_every_token_of_their_history_and_no_other(tower):
    histories, candidates = make_rows([3, 6, 9], [2, 3, 2])
    before = run(tower, histories, candidates)
    for position in range(6):
        other = [row.clone() for row in histories]
        other[1][position] += 0.1
        changed = (before - run(tower, other, candidates)).abs().amax(-1) > 1e-9
        assert changed.tolist() == [False] * 2 + [True] * 3 + [False] * 2, position


def test_the_rest_of_the_batch_does_not_matter(tower):
    """Neither which requests there are, nor their order among equal lengths."""
    histories, candidates = make_rows([0, 4, 4, 4, 14], [1, 2, 1, 3, 2])
    expected = run(tower, histories, candidates).split([1, 2, 1, 3, 2])
    for kept in ([0], [1], [4], [3, 1, 2], [0, 2, 4]):
        got = run(tower, [histories[i] for i in kept], [candidates[i] for i in kept])
        torch.testing.assert_close(got, torch.cat([expected[i] for i in kept]), **TOLERANCE)


@pytest.mark.parametrize(
    ("lengths", "counts"), [([], []), ([0, 0], [0, 0]), ([0, 0], [1, 3]), ([3, 4], [0, 0]), ([0, 9], [2, 0])], ids=str
)
def test_degenerate_batches_run_and_reach_every_parameter(tower, lengths, counts):
    histories, candidates = make_rows(lengths, counts)
    out = run(tower, histories, candidates)
    assert out.shape == (sum(counts), tower.out_width)
    tower.zero_grad()
    if list(tower.parameters()):  # DeepFM has none
        out.sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_histories_have_no_states(tower):
    histories, candidates = make_rows([3], [2])
    packing = Packing.from_lengths(np.array([3]), np.array([2]))
    with pytest.raises(ValueError, match="call it with candidates_only"):
        tower(torch.cat([*histories, *candidates]), packing)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_off_in_evaluation(name):
    histories, candidates = make_rows([3, 5], [2, 2])
    dropped, plain = make_tower(name, dropout=0.5).eval(), make_tower(name)
    torch.testing.assert_close(run(dropped, histories, candidates), run(plain, histories, candidates), rtol=0, atol=0)
    has_dropout = any(isinstance(module, torch.nn.Dropout) for module in dropped.modules())
    dropped.train()
    assert torch.equal(run(dropped, histories, candidates), run(dropped, histories, candidates)) != has_dropout


# --- states of histories, for the auxiliary loss ------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPERVISED)
@pytest.mark.parametrize(("lengths", "counts"), [(LENGTHS, COUNTS), ([0, 0], [1, 0]), ([5], [0])], ids=str)
def test_history_states_equal_the_loops(name, lengths, counts):
    tower = make_tower(name)
    histories, candidates = make_rows(lengths, counts)
    states, history_TN = run(tower, histories, candidates, with_history=True)
    torch.testing.assert_close(states, run(tower, histories, candidates), rtol=0, atol=0)
    weights, tokens = dict(tower.named_parameters()), [history.flatten(1) for history in histories if len(history)]
    loops = {"dien": reference_ctr.gru_states, "dmin": lambda x, w: reference_ctr.dmin_refined(x, w, heads=2)}
    expected = [state for row in tokens for state in loops[name](row, weights)]
    assert history_TN.shape == (sum(lengths), FIELDS * WIDTH)
    if expected:
        torch.testing.assert_close(history_TN, torch.stack(expected), **TOLERANCE)


@pytest.mark.parametrize("name", SUPERVISED)
def test_history_states_do_not_see_what_they_predict(name):
    tower = make_tower(name)
    histories, candidates = make_rows([9], [1])
    before = run(tower, histories, candidates, with_history=True)[1]
    histories[0][6] += 1.0
    candidates[0] += 1.0
    changed = (before - run(tower, histories, candidates, with_history=True)[1]).abs().amax(-1) > 1e-9
    assert changed.tolist() == [False] * 6 + [True] * 3


def test_dmin_refuses_heads_that_do_not_divide_a_token():
    config = ModelConfig("dmin", width=8, heads=5)
    with pytest.raises(ValueError, match="3 token features x width 8 channels into 5 heads"):
        TOWERS["dmin"](config, FIELDS)


def test_wukong_refuses_a_history_that_has_no_slots():
    histories, candidates = make_rows([16], [1])
    with pytest.raises(ValueError, match="history of 16 tokens does not fit into 15 slots"):
        run(make_tower("wukong"), histories, candidates)
