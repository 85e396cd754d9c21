"""Counts of recent events, against loops over the log."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gpsd_dist.data import item_events, split_batches
from gpsd_dist.data.item_events import ItemEvents, read_item_events
from gpsd_dist.data.item_offsets import ItemOffsets, Moments
from gpsd_dist.model.item_score import window_weights
from tests.integration.tiny_data import write_tiny_data

ITEMS, NEWEST = 9, 1_000


@pytest.fixture(scope="module")
def log():
    """Few seconds and few items, so that much coincides; item 8 never happens."""
    random = np.random.default_rng(0)
    return random.integers(0, 8, 60), np.append(random.integers(NEWEST - 30, NEWEST, 59), NEWEST)


def counted(log, item, moment, window):
    moment = min(moment, NEWEST + 1)
    return sum(moment - window <= t < moment for i, t in zip(*log, strict=True) if i == item)


@pytest.mark.parametrize("per_pair", [0, 8, 0.01])
@pytest.mark.parametrize("window", [1, 7, 10_000])
def test_counts_are_those_of_a_loop(log, window, per_pair, monkeypatch):
    """Moments: unknown, before all, among the events, right behind the newest, long after it. Both ways to count."""
    monkeypatch.setattr(item_events, "_EVENTS_PER_PAIR", per_pair)
    events = ItemEvents(*map(torch.from_numpy, log))
    moments = [NEWEST - 3, -1, 0, NEWEST - 30, NEWEST - 15, NEWEST, NEWEST + 1, NEWEST + 500, NEWEST - 3]
    items = [8, 3, 3, 0, 7, 5]
    expected = [[counted(log, item, moment, window) for item in items] for moment in moments]
    found = events.count_all(torch.tensor(items), torch.tensor(moments), window)
    assert found.tolist() == expected and found.max() > 0
    pairs = events.count(torch.tensor(items), torch.tensor(moments)[:, None], window)
    assert torch.equal(pairs, found)
    for moment, row in zip(moments, expected, strict=True):
        assert events.count_all(torch.tensor(items), torch.tensor([moment]), window).tolist() == [row]
    assert events.count_all(torch.tensor(items), torch.tensor([], dtype=torch.int64), window).shape == (0, 6)


def test_a_copy_by_its_tensors_counts_alike(log):
    events = ItemEvents(*map(torch.from_numpy, log))
    again = ItemEvents(**events.tensors())
    assert torch.equal(again._code_N, events._code_N) and len(again) == 60
    assert (
        not ItemEvents(torch.zeros(0).long(), torch.zeros(0).long())
        .count_all(torch.arange(3), torch.tensor([5]), 9)
        .any()
    )


def test_offsets_add_up_and_have_one_order_of_terms(log):
    events = ItemEvents(*map(torch.from_numpy, log))
    bias, weight = torch.randn(ITEMS).double(), torch.tensor([[0.7, -1.3], [0.1, 2.0]]).double()
    offsets = ItemOffsets(bias, (5 / 86_400, 1.0), events)
    items, moments = torch.arange(ITEMS), torch.tensor([NEWEST, NEWEST - 9])
    found = offsets.of_all(items, Moments(moments, weight))
    for b, moment in enumerate(moments.tolist()):
        for item in items.tolist():
            logs = [np.log1p(counted(log, item, moment, window)) for window in (5, 86_400)]
            expected = float(bias[item]) + float(weight[b, 0]) * logs[0] + float(weight[b, 1]) * logs[1]
            assert float(found[b, item]) == pytest.approx(expected, abs=1e-12)
    assert torch.equal(offsets.of_own(items.expand(2, ITEMS), Moments(moments, weight)), found)
    assert torch.equal(offsets.of_own(torch.tensor([4, 7]), Moments(moments, weight)), found[[0, 1], [4, 7]])


def test_weights_follow_the_state_and_the_time_since_its_last_event():
    weight_WF, state = torch.randn(3, 6).double(), torch.randn(4, 4).double()
    last, now = torch.tensor([10, -1, 10, 90]), torch.tensor([70, 70, -1, 70])
    found = window_weights(weight_WF, state, last, now)
    for m, gap in enumerate([60, 0, 0, 0]):
        inputs = torch.cat((state[m], torch.tensor([math.log1p(gap) / 20, 1.0]).double()))
        torch.testing.assert_close(found[m], weight_WF @ inputs)


@pytest.mark.parametrize("at_once", [0, 1 << 22])
def test_events_of_the_splits_are_read_once_each(tmp_path, at_once, monkeypatch):
    """Histories repeat events of one another, and a target may stand in a later history."""
    monkeypatch.setattr(item_events, "_AT_ONCE", at_once)
    monkeypatch.setattr(split_batches, "_BATCH_ROWS", 5)
    manifest = write_tiny_data(tmp_path)
    events, num_untimed = read_item_events(tmp_path, manifest, ("pretrain", "valid"))
    expected, untimed = set(), 0
    for split in ("pretrain", "valid"):
        for row in pq.read_table(tmp_path / split).to_pylist():
            seen = list(zip(row["history.item"], row["history.time_s"], strict=True))
            if split == "valid":
                labels = zip(row["candidate.item"], row["label.click"], strict=True)
                seen += [(item, row["request_time_s"]) for item, label in labels if label == 1]
            untimed += sum(time is None for _, time in seen)
            expected |= {(row["user_hash"], item, time) for item, time in seen if time is not None}
    found = events.tensors()
    assert sorted(zip(found["item_N"].tolist(), found["time_s_N"].tolist(), strict=True)) == sorted(
        (item, time) for _, item, time in expected
    )
    assert num_untimed == untimed > 0
