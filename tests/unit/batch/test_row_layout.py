import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsd_dist.batch import row_layout
from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.row_layout import ROW_WIDTH, plan_rows, row_geometry

REQUESTS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 5)), min_size=1, max_size=30)


def sees(lengths, counts) -> torch.Tensor:
    """bool [S, S], token by token: who attends to whom."""
    owner = [i for i, n in enumerate(lengths) for _ in range(n)] + [i for i, n in enumerate(counts) for _ in range(n)]
    num_history = sum(lengths)
    table = [
        [
            me == other or (other < num_history and owner[me] == owner[other] and (other < me or me >= num_history))
            for other in range(len(owner))
        ]
        for me in range(len(owner))
    ]
    return torch.tensor(table, dtype=torch.bool)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS)
def test_every_token_has_a_slot_and_sees_what_it_should(requests):
    lengths, counts = np.array(sorted(requests), np.int64).T
    rows = plan_rows(lengths, counts)
    if not lengths.sum() + counts.sum():
        assert rows is None
        return
    slots, total = rows.slot_S, len(rows.entry_R)
    assert rows.entry_R[slots].tolist() == list(range(len(slots))) and total == sum(
        block.num_rows * block.width for block in rows.blocks
    )
    allowed, start = torch.zeros(total, total, dtype=torch.bool), 0
    for block in rows.blocks:
        causal = torch.ones(block.width, block.width).tril().bool()
        masks = causal.expand(block.num_rows, -1, -1) if block.mask is None else block.mask[:, 0] == 0
        for mask in masks:
            assert mask.any(1).all(), "a softmax over nothing"
            allowed[start : start + block.width, start : start + block.width] = mask
            start += block.width
    assert torch.equal(allowed[slots][:, slots], sees(lengths.tolist(), counts.tolist()))
    is_padding = torch.ones(total, dtype=torch.bool)
    is_padding[slots] = False
    assert not allowed[slots][:, is_padding].any(), "a token attends to padding"


def test_short_requests_share_rows():
    lengths = np.full(100, 7)
    [block] = plan_rows(lengths, np.ones(100, np.int64)).blocks
    assert (block.num_rows, block.width) == (25, ROW_WIDTH)  # 4 x (7 + 1) tokens each


def test_long_histories_need_no_mask_unless_they_have_several_candidates():
    lengths = np.full(6, 60)
    assert plan_rows(lengths, np.ones(6, np.int64)).blocks[0].mask is None
    assert plan_rows(lengths, np.full(6, 2)).blocks[0].mask is not None


@pytest.mark.parametrize(("history", "count"), [(7, 0), (7, 1), (3, 9), (50, 1), (60, 3), (199, 1)])
def test_geometry_of_equal_requests(history, count):
    requests = 32 // (history + count) * 4 or 4
    rows = plan_rows(np.full(requests, history), np.full(requests, count))
    slots = sum(block.num_rows * block.width for block in rows.blocks)
    masks = sum(0 if block.mask is None else block.mask.numel() for block in rows.blocks)
    per_token, per_slot = row_geometry(requests, history, count)
    assert slots == pytest.approx(per_token * requests * (history + count)) and masks == per_slot * slots


def test_masks_that_would_not_fit_leave_it_to_the_buckets(monkeypatch):
    lengths, counts = np.array([3, 40]), np.array([1, 20])
    assert Packing.from_lengths(lengths, counts).rows is not None
    monkeypatch.setattr(row_layout, "_MAX_MASK_ELEMENTS", 100)
    assert Packing.from_lengths(lengths, counts).rows is None and row_geometry(2, 40, 20) is None


def test_many_candidates_leave_it_to_the_buckets_whose_cost_is_linear():
    at, above = (row_layout._MAX_ROW_CANDIDATES + more for more in (0, 1))
    for count, has_rows in ((at, True), (above, False)):
        assert (plan_rows(np.array([3, 40]), np.array([1, count])) is not None) == has_rows
        assert (row_geometry(2, 40, count) is not None) == has_rows
