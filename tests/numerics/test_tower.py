"""The packed tower against a padded reference written independently.

float64 on both sides, but the tower rotates queries and keys in float32 (as bf16 training needs), which leaves about
1e-7 relative: TOLERANCE is 1e-5, far below any error of a mask, a position or an offset.
"""

import numpy as np
import pytest
import torch

from gpsd_dist.batch import packing as packing_module
from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.transformer import RotaryPositions, Rotate, Transformer, turned_as_complex, turned_by_parts
from tests.helpers import reference

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LAYERS, WIDTH, HEADS = 2, 16, 2
LENGTHS = [0, 0, 1, 3, 3, 7, 8, 9, 12, 13, 30]  # empty, on and beside the cuts 8, 12, 18, 27, 41


@pytest.fixture(scope="module")
def tower():
    return reference.fill_(Transformer(ModelConfig(layers=LAYERS, width=WIDTH, heads=HEADS), 1).double())


def make_rows(lengths, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, dtype=torch.float64, generator=random) for length in lengths]


def plan(lengths, counts=None):
    counts = np.zeros(len(lengths), np.int64) if counts is None else np.array(counts)
    return Packing.from_lengths(np.array(lengths, np.int64), counts)


def run_packed(tower, rows):
    """Hidden states of rows in the order given; the tower gets them sorted by length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    hidden = tower(torch.cat([rows[i] for i in order]), plan([len(rows[i]) for i in order]))
    parts = dict(zip(order, hidden.split([len(rows[i]) for i in order])))
    return [parts[i] for i in range(len(rows))]


def test_packed_equals_padded_forward_and_backward(tower):
    rows = [row.requires_grad_() for row in make_rows(LENGTHS)]
    packed = torch.cat(run_packed(tower, rows))
    padded, lengths = reference.pad(rows)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in tower.named_parameters()}
    hidden = reference.transformer(padded, lengths, weights, layers=LAYERS, heads=HEADS)
    expected = torch.cat([row[:length] for row, length in zip(hidden, lengths)])
    torch.testing.assert_close(packed, expected, **TOLERANCE)

    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [row for row in rows if len(row)]
    got = torch.autograd.grad(packed, [*inputs, *tower.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [*inputs, *weights.values()], upstream)
    for name, ours, theirs in zip([f"input {i}" for i in range(len(inputs))] + list(weights), got, wanted):
        assert theirs.abs().max() > 1e-3, f"the gradient of {name} does not test anything"
        torch.testing.assert_close(ours, theirs, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_order_of_requests_does_not_matter(tower):
    rows = make_rows(LENGTHS)
    expected = run_packed(tower, rows)
    shuffle = np.random.default_rng(0).permutation(len(rows))
    for i, got in zip(shuffle, run_packed(tower, [rows[i] for i in shuffle])):
        torch.testing.assert_close(got, expected[i], **TOLERANCE)


@pytest.mark.parametrize(("first_width", "growth"), [(1, 1.01), (3, 2.0), (1000, 1.5)])
def test_cuts_of_the_buckets_do_not_matter(tower, monkeypatch, first_width, growth):
    """Nor does attention in shared rows or in buckets."""
    rows = make_rows(LENGTHS)
    expected, widths = torch.cat(run_packed(tower, rows)), [bucket.width for bucket in plan(LENGTHS).buckets]
    monkeypatch.setattr(packing_module, "plan_rows", lambda *lengths: None)
    monkeypatch.setattr(packing_module, "_FIRST_WIDTH", first_width)
    monkeypatch.setattr(packing_module, "_GROWTH", growth)
    assert [bucket.width for bucket in plan(LENGTHS).buckets] != widths
    torch.testing.assert_close(torch.cat(run_packed(tower, rows)), expected, **TOLERANCE)


def test_other_requests_of_the_batch_do_not_matter(tower):
    rows = make_rows(LENGTHS)
    together = run_packed(tower, rows)
    for row, got in zip(rows, together):
        if len(row):
            torch.testing.assert_close(run_packed(tower, [row])[0], got, **TOLERANCE)


def test_future_does_not_change_the_past(tower):
    rows = make_rows([9, 11])
    before = run_packed(tower, rows)
    changed = [rows[0], rows[1].clone()]
    changed[1][6:] += 1.0
    after = run_packed(tower, changed)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1][:6], after[1][:6])
    assert ((before[1][6:] - after[1][6:]).abs().amax(-1) > 1e-3).all()


def test_past_changes_every_later_token(tower):
    rows = make_rows([12])
    before = run_packed(tower, rows)[0]
    rows[0][2] += 1.0
    changed = (before - run_packed(tower, rows)[0]).abs().amax(-1) > 1e-6
    assert changed.tolist() == [False] * 2 + [True] * 10


def test_attention_depends_on_distance_alone():
    """Rotary scores of equal content at equal distances agree wherever the pair stands."""
    qkv = torch.randn(1, 3, 1, 8, generator=torch.Generator().manual_seed(0)).expand(20, 3, 1, 8).contiguous()
    rotated = Rotate.apply(qkv, *RotaryPositions(8, heads=1)(torch.arange(20)))
    score = rotated[:, 0, 0] @ rotated[:, 1, 0].T
    for distance in (0, 1, 5):
        diagonal = score.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (score[10, 10] - score[10, 5]).abs() > 1e-2


def test_rotation_is_the_official_layout():
    """Channels (2i, 2i + 1) turn by position * 10000^(-2i / K)."""
    x = torch.randn(6, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([0, 1, 2, 0, 7, 50])
    expected = reference.rotary(x[:, :2].double().flatten(1, 2)[None], position[None])[0].unflatten(1, (2, 4))
    rotated = Rotate.apply(x, *RotaryPositions(8, heads=4)(position))
    torch.testing.assert_close(rotated[:, :2].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rotated[:, 2], x[:, 2])


def test_a_cpu_computes_each_position_once_and_the_backward_rotation_for_training_alone():
    rotary, position = RotaryPositions(16, heads=4), torch.tensor([3, 0, 51, 3, 7])
    each, shared = rotary(position), rotary(position, 60)
    assert torch.equal(each.turn, shared.turn) and torch.equal(each.back, shared.back)
    with torch.no_grad():
        assert torch.equal(rotary(position, 51).turn, each.turn) and rotary(position, 51).back is None
        assert rotary(position[:0], 0).turn.shape == (0, 3, 4, 8, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gpu_turns_pairs_as_a_cpu_does(dtype):
    """In real numbers: two products and a sum per channel, each rounded once."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(50, 3, 4, 8, 2, generator=generator, dtype=dtype)
    turn, _ = RotaryPositions(16, heads=4)(torch.arange(50))
    by_parts, as_complex = turned_by_parts(pair, turn), turned_as_complex(pair, turn)
    assert by_parts.dtype == as_complex.dtype == dtype
    torch.testing.assert_close(by_parts, as_complex, rtol=0, atol=3 * torch.finfo(dtype).eps * pair.abs().max().item())


def test_dropout_is_off_in_evaluation_and_on_in_training():
    tower = reference.fill_(Transformer(ModelConfig(layers=1, width=WIDTH, heads=HEADS, dropout=0.5), 1).double())
    rows = make_rows([5])
    assert not torch.equal(run_packed(tower, rows)[0], run_packed(tower, rows)[0])
    tower.eval()
    plain = reference.fill_(Transformer(ModelConfig(layers=1, width=WIDTH, heads=HEADS), 1).double())
    torch.testing.assert_close(run_packed(tower, rows)[0], run_packed(plain, rows)[0], rtol=0, atol=0)
