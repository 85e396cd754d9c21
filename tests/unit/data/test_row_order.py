import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsd_dist.data import row_order


def make_order(group_rows, num_data_shards=4, window_rows=50, epoch=0, seed=0, shuffle=True):
    rows = np.array(group_rows, np.int64)
    return row_order.EpochOrder(rows, epoch, num_data_shards, window_rows, seed, shuffle)


def rows_of_shard(order, shard):
    """Row numbers in the split, in the order the shard uses them."""
    group_start = np.cumsum(order.group_rows_G) - order.group_rows_G
    used, position = [], 0
    while position < order.shard_rows(shard):
        window = order.window_at(shard, position)
        start, position = order.window_range(shard, window)
        first = order.shard_start(shard)
        slices = order.group_slices(first + start, first + position)
        rows = np.concatenate([group_start[group] + at + np.arange(num) for group, at, num in slices])
        permutation = order.window_order(shard, window)
        used.append(rows if permutation is None else rows[permutation])
    return np.concatenate([np.zeros(0, np.int64), *used])


@settings(max_examples=60, deadline=None)
@given(
    group_rows=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    num_data_shards=st.integers(1, 9),
    window_rows=st.integers(1, 100),
    shuffle=st.booleans(),
)
def test_shards_hold_each_row_once(group_rows, num_data_shards, window_rows, shuffle):
    order = make_order(group_rows, num_data_shards, window_rows, shuffle=shuffle)
    shards = [rows_of_shard(order, shard) for shard in range(num_data_shards)]
    assert np.sort(np.concatenate(shards)).tolist() == list(range(sum(group_rows)))
    sizes = [len(rows) for rows in shards]
    assert sizes == [order.shard_rows(shard) for shard in range(num_data_shards)] and max(sizes) - min(sizes) <= 1
    if not shuffle:
        assert np.concatenate(shards).tolist() == list(range(sum(group_rows)))


@settings(max_examples=80, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=20), min_size=1, max_size=12),
    num_data_shards=st.integers(1, 9),
    shuffle=st.booleans(),
)
def test_shards_by_weight_hold_each_row_once_and_equal_weight(groups, num_data_shards, shuffle):
    """`groups`: weights of the rows of every group. Either end of a shard is off by less than a row."""
    weights = [np.array(group) for group in groups]
    rows, totals = (np.array([f(group) for group in weights], np.int64) for f in (len, np.sum))
    order = row_order.EpochOrder(rows, 0, num_data_shards, 50, 0, shuffle, totals, lambda group: weights[group])
    shards = [rows_of_shard(order, shard) for shard in range(num_data_shards)]
    assert np.sort(np.concatenate(shards)).tolist() == list(range(sum(rows)))
    weight = np.concatenate(weights)
    share = weight.sum() / num_data_shards
    assert all(abs(weight[shard].sum() - share) < weight.max() + 1 for shard in shards)


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 200), batch_rows=st.integers(1, 60), num_data_shards=st.integers(1, 9))
def test_cuts_by_rows_fill_every_batch_evenly_and_never_over(num_rows, batch_rows, num_data_shards):
    order = make_order([num_rows], num_data_shards)
    num_steps = -(-num_rows // batch_rows)
    cuts = np.array(
        [
            [row_order.cut_by_rows(order, shard, step, num_steps) for step in range(num_steps + 1)]
            for shard in range(num_data_shards)
        ]
    )
    assert (cuts[:, 0] == 0).all()
    assert cuts[:, -1].tolist() == [order.shard_rows(shard) for shard in range(num_data_shards)]
    sizes = np.diff(cuts).sum(axis=0)
    assert sizes.max() <= batch_rows and sizes.max() - sizes.min() <= 1


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 30), max_size=80), num_steps=st.integers(1, 20))
def test_cuts_by_weight_stay_within_one_row_of_the_share(weights, num_steps):
    weight_R = np.array(weights, np.int32)
    cuts = row_order.cuts_by_weight(weight_R, num_steps)
    assert cuts[0] == 0 and cuts[-1] == len(weights) and (np.diff(cuts) >= 0).all()
    share = weight_R.sum() / num_steps
    for start, end in itertools.pairwise(cuts):
        assert abs(weight_R[start:end].sum() - share) < max([*weights, 1])


def test_order_is_a_function_of_seed_and_epoch():
    first = rows_of_shard(make_order([100] * 10), 1)
    assert (first == rows_of_shard(make_order([100] * 10), 1)).all()
    for other in (make_order([100] * 10, epoch=1), make_order([100] * 10, seed=1)):
        assert not np.array_equal(np.sort(first), np.sort(rows_of_shard(other, 1)))


def test_order_of_this_version_is_the_order_of_saved_positions():
    """A change here breaks the resumption of every run under way: raise a version in the saved position with it."""
    assert row_order.random_order(8, 7, 1, 2, 3).tolist() == [2, 3, 6, 5, 1, 7, 4, 0]


def test_shuffling_leaves_no_trace_of_the_input_order():
    num_groups, group_rows, num_data_shards = 64, 250, 2
    order = make_order([group_rows] * num_groups, num_data_shards, window_rows=8 * group_rows)
    for shard in range(num_data_shards):
        rows = rows_of_shard(order, shard)
        # Inside a window the order is uniform: |r| of 2,000 independent pairs stays below 0.1 (4.5 sigma).
        start, end = order.window_range(shard, 2)
        permutation = order.window_order(shard, 2)
        assert abs(np.corrcoef(permutation, np.arange(end - start))[0, 1]) < 0.1
        # Over a shard only the 32 permuted groups count: sigma is about 1 / sqrt(31) = 0.18.
        assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.6
        # Rows that were neighbours are one window apart or less, on average a third of it.
        place = np.argsort(rows)
        neighbours = np.diff(np.sort(rows)) == 1
        assert np.abs(np.diff(place))[neighbours].mean() > 8 * group_rows / 4
        assert (np.abs(np.diff(rows)) == 1).mean() < 0.005


def test_shards_do_not_enter_windows_in_the_same_step():
    order = make_order([1000], num_data_shards=4, window_rows=100)
    assert [order.window_range(shard, 0)[1] for shard in range(4)] == [25, 50, 75, 100]
    assert order.window_range(1, 1) == (50, 150)
