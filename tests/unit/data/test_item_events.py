"""Counts of recent events, against loops over the log."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gpsd_dist.data.item_events import ItemEvents, read_item_events
from gpsd_dist.data.item_offsets import ItemOffsets
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


@pytest.mark.parametrize("window", [1, 7, 10_000])
def test_counts_are_those_of_a_loop(log, window):
    """Moments: unknown, before all, among the events, right behind the newest, long after it."""
    events = ItemEvents(*map(torch.from_numpy, log))
    moments = [NEWEST - 3, -1, 0, NEWEST - 30, NEWEST - 15, NEWEST, NEWEST + 1, NEWEST + 500, NEWEST - 3]
    items = [8, 3, 3, 0, 7, 5]
    expected = [[counted(log, item, moment, window) for item in items] for moment in moments]
    found = events.count_all(torch.tensor(items), torch.tensor(moments), window)
    assert found.tolist() == expected and found.max() > 0
    pairs = events.count(torch.tensor(items), torch.tensor(moments)[:, None], window)
    assert torch.equal(pairs, found)


def test_a_copy_by_its_tensors_counts_alike(log):
    events = ItemEvents(*map(torch.from_numpy, log))
    again = ItemEvents(**events.tensors())
    assert torch.equal(again._code_N, events._code_N) and len(again) == 60
    assert (
        not ItemEvents(torch.zeros(0).long(), torch.zeros(0).long())
        .count_all(torch.arange(3), torch.tensor([5]), 9)
        .any()
    )


def test_offsets_add_up_and_no_moment_has_another_order_of_terms(log):
    events = ItemEvents(*map(torch.from_numpy, log))
    bias, weight = torch.randn(ITEMS), torch.tensor([0.7, -1.3])
    offsets = ItemOffsets(bias, weight, (5 / 86_400, 1.0), events).double()
    items, moments = torch.arange(ITEMS), torch.tensor([NEWEST, NEWEST - 9])
    found = offsets.of_all(items, moments)
    for b, moment in enumerate(moments.tolist()):
        for item in items.tolist():
            logs = [np.log1p(counted(log, item, moment, window)) for window in (5, 86_400)]
            expected = float(bias[item]) + float(weight[0]) * logs[0] + float(weight[1]) * logs[1]
            assert float(found[b, item]) == pytest.approx(expected, abs=1e-12)
    assert torch.equal(offsets.of_pairs(items, moments[:, None]), found)
    assert found.abs().max() <= offsets.bound()


def test_events_of_the_splits_are_read_once_each(tmp_path):
    """Histories repeat events of one another, and a target may stand in a later history."""
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
