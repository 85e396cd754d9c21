"""SASRec and HSTU on packed batches against loops over single sequences, in float64 (time buckets in float32 logs).

Sums of at most 30 terms differ in order alone: TOLERANCE is far below any error of a mask, a position or a bucket.
"""

import math

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.ops import hstu_bias
from gpsd_dist.model.registry import TOWERS, Times
from tests.helpers import reference_generative as reference
from tests.helpers.reference import fill_

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
LAYERS, WIDTH, HEADS = 2, 6, 2
KINDS = {"sasrec": {"ffn_width": 10}, "hstu": {"head_width": 5}, "hstu, no times": {"time_bias": False}}
BATCHES = [  # lengths, numbers of candidates
    ([5], [1]),
    ([0, 0, 3, 8, 8], [2, 1, 4, 1, 3]),
    ([4, 4, 4], [2, 2, 2]),
    ([0, 1, 9, 13], [3, 2, 0, 1]),
    ([1, 7, 8, 30], [0, 0, 0, 0]),
    ([0, 2, 9], [9, 10, 2]),
]


def make_tower(kind, **options):
    config = ModelConfig(kind.split(",")[0], LAYERS, WIDTH, HEADS, max_positions=31, **KINDS[kind] | options)
    return fill_(TOWERS[config.name](config, 1).double())


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tower(kind):
    return make_tower(kind)


def make_rows(lengths, counts, seed=0):
    random = torch.Generator().manual_seed(seed)
    draw = [[torch.randn(n, WIDTH, dtype=torch.float64, generator=random) for n in part] for part in (lengths, counts)]
    return draw[0], draw[1]


def make_times(lengths, seed=0):
    """Ascending seconds with gaps from none to years, an unknown one in every long history and one unknown request."""
    random = np.random.default_rng(seed)
    times = []
    for length in lengths:
        gaps = np.floor(np.exp(random.uniform(0, 18, length + 1)) - 1).astype(int)
        times.append((1_500_000_000 + np.cumsum(gaps)).tolist())
        if length > 6:
            times[-1][3] = -1
    times[-1][-1] = -1
    return [row[:-1] for row in times], [row[-1] for row in times]


def run_packed(tower, history, candidates, events, requests, **options):
    lengths, counts = (np.array([len(row) for row in rows], np.int64) for rows in (history, candidates))
    event_T = torch.tensor([time for row in events for time in row], dtype=torch.int64)
    times = Times(event_T, torch.tensor(requests))
    packing = Packing.from_lengths(lengths, counts)
    return tower(torch.cat([*history, *candidates]), packing, times=times, **options)


@pytest.mark.parametrize(("lengths", "counts"), BATCHES, ids=str)
def test_packed_equals_loops_forward_and_backward(tower, kind, lengths, counts):
    history, candidates = make_rows(lengths, counts)
    events, requests = make_times(lengths)
    leaves = [row.requires_grad_() for row in (*history, *candidates) if len(row)]
    packed = run_packed(tower, history, candidates, events, requests)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in tower.named_parameters()}
    run = reference.sasrec if kind == "sasrec" else reference.hstu
    sizes = {"layers": LAYERS, "heads": HEADS, "times": events, "request_times": requests}
    expected = reference.histories_and_candidates(run, history, candidates, weights, **sizes)
    torch.testing.assert_close(packed, expected, **TOLERANCE)

    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(packed, [*leaves, *tower.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [*leaves, *weights.values()], upstream)
    names = [f"row {i}" for i in range(len(leaves))] + list(weights)
    for name, ours, theirs in zip(names, got, wanted):
        assert theirs.abs().max() > 1e-6, f"the gradient of {name} does not test anything"
        torch.testing.assert_close(ours, theirs, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("counts", [[2, 1, 4, 1], [9, 12, 1, 10]], ids=str)
def test_candidates_only_gives_the_candidates_of_the_full_pass(tower, counts):
    lengths = [0, 3, 8, 20]
    arguments = (*make_rows(lengths, counts), *make_times(lengths))
    full = run_packed(tower, *arguments)[sum(lengths) :]
    torch.testing.assert_close(run_packed(tower, *arguments, candidates_only=True), full, rtol=1e-12, atol=1e-12)


def test_a_state_depends_on_its_past_alone(tower, kind):
    """Event 6 of the second history changes: nothing before it does, and everything from it on."""
    history, candidates = make_rows([9, 11], [1, 2])
    events, requests = make_times([9, 11])
    before = run_packed(tower, history, candidates, events, requests)
    history[1] = history[1].clone()
    history[1][6, 0] += 1.0  # one channel: norms do not see a shift of all
    changed = (before - run_packed(tower, history, candidates, events, requests)).abs().amax(-1) > 1e-9
    assert changed.tolist() == [False] * (9 + 6) + [True] * 5 + [False] + [True] * 2


def test_the_time_of_an_event_reaches_no_state_before_the_one_that_predicts_it(tower, kind):
    """With a time bias the state of event 5 knows when event 6 happens, that of event 4 does not."""
    history, candidates = make_rows([9, 11], [1, 2])
    events, requests = make_times([9, 11])
    before = run_packed(tower, history, candidates, events, requests)
    events[1][6] += 5_000_000
    changed = (before - run_packed(tower, history, candidates, events, requests)).abs().amax(-1) > 1e-9
    expected = [False] * (9 + 5) + [True] * 6 + [False] + [True] * 2
    assert changed.tolist() == (expected if kind == "hstu" else [False] * 23)


def test_candidates_do_not_see_each_other(tower):
    history, candidates = make_rows([0, 6, 9], [2, 3, 2])
    times = make_times([0, 6, 9])
    before = run_packed(tower, history, candidates, *times)
    candidates[1] = candidates[1].clone()
    candidates[1][1, 0] += 1.0
    changed = (before - run_packed(tower, history, candidates, *times)).abs().amax(-1) > 0
    assert changed.nonzero().flatten().tolist() == [15 + 2 + 1]


@pytest.mark.parametrize(("lengths", "counts"), [([], []), ([0, 0], [1, 3]), ([0, 0], [0, 0]), ([3], [0])], ids=str)
def test_degenerate_batches_run_forward_and_backward(tower, lengths, counts):
    history, candidates = make_rows(lengths, counts)
    times = Times(torch.full((sum(lengths),), 7), torch.full((len(lengths),), 9))
    packing = Packing.from_lengths(np.array(lengths, np.int64), np.array(counts, np.int64))
    x_SD = torch.cat([*history, *candidates, torch.zeros(0, WIDTH, dtype=torch.float64)]).requires_grad_()
    for candidates_only in (False, True):
        out = tower(x_SD, packing, candidates_only, times)
        gradients = torch.autograd.grad(out.sum(), [x_SD, *tower.parameters()], allow_unused=candidates_only)
        assert out.shape == (sum(counts) if candidates_only else len(x_SD), WIDTH)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_no_times_are_unknown_times(tower):
    history, candidates = make_rows([3, 8], [1, 2])
    packing = Packing.from_lengths(np.array([3, 8]), np.array([1, 2]))
    unknown = [[-1] * 3, [-1] * 8], [-1, -1]
    given = run_packed(tower, history, candidates, *unknown)
    assert torch.equal(tower(torch.cat([*history, *candidates]), packing), given)


@pytest.mark.parametrize("dropout_of_many", [[2, 2], [12, 1]], ids=str)
def test_dropout_is_off_in_evaluation_and_on_in_training(kind, dropout_of_many):
    arguments = (*make_rows([4, 9], dropout_of_many), *make_times([4, 9]))
    tower = make_tower(kind, dropout=0.5)
    assert not torch.equal(run_packed(tower, *arguments), run_packed(tower, *arguments))
    tower.eval()
    torch.testing.assert_close(run_packed(tower, *arguments), run_packed(make_tower(kind), *arguments), **TOLERANCE)


def test_attention_weights_of_sasrec_are_dropped_too():
    """With all other dropouts off, two passes differ."""
    tower = make_tower("sasrec", dropout=0.5)
    arguments = (*make_rows([9], [2]), *make_times([9]))
    tower.positions.dropout.eval()
    for block in tower.blocks:
        block.dropout.eval()
    assert not torch.equal(run_packed(tower, *arguments)[1:], run_packed(tower, *arguments)[1:])


def test_autocast_to_bfloat16_stays_close(kind):
    """8 bits of mantissa through two layers."""
    tower = make_tower(kind).float()
    arguments = (*([row.float() for row in rows] for rows in make_rows([0, 4, 9], [2, 1, 12])), *make_times([0, 4, 9]))
    expected = run_packed(tower, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        for candidates_only in (False, True):
            got = run_packed(tower, *arguments, candidates_only=candidates_only)
            wanted = expected[13:] if candidates_only else expected
            torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05 * expected.abs().max().item())


# Every power of 1.35 is one bucket; the second column is floor(ln(gap) / 0.301) by hand.
BY_HAND = [(0, 0), (1, 0), (2, 2), (3, 3), (60, 13), (3_600, 27), (86_400, 37), (31_536_000, 57), (10**12, 91)]


@pytest.mark.parametrize(("gap", "bucket"), BY_HAND)
def test_time_buckets_by_hand(gap, bucket):
    start = torch.tensor([1_000])
    assert hstu_bias.time_bucket(start + gap, start).tolist() == [bucket]
    assert hstu_bias.time_bucket(start, start + gap).tolist() == [bucket]
    assert reference.time_bucket(1_000 + gap, 1_000) == bucket


def test_unknown_times_have_a_bucket_that_no_known_gap_reaches():
    known, unknown = torch.tensor([0, 5]), torch.tensor([-1, -1])
    assert hstu_bias.time_bucket(unknown, known).tolist() == [128, 128]
    assert hstu_bias.time_bucket(known, unknown).tolist() == [128, 128]
    age_of_the_universe_s = torch.tensor([435 * 10**15])
    assert hstu_bias.time_bucket(age_of_the_universe_s, known[:1]).item() == 128  # and nothing younger:
    assert hstu_bias.time_bucket(age_of_the_universe_s // 10, known[:1]).item() < 128
    assert math.exp(128 * 0.301) / 31_557_600 > 1e9  # years
