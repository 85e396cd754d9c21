import pytest
import torch

from gpsd_dist.batch import lookup as lookup_module
from gpsd_dist.batch.lookup import lookup_of


@pytest.mark.parametrize("num_bags", [1, 4, 100])
def test_rows_are_spread_evenly_over_the_bags_of_their_table(num_bags, monkeypatch):
    """One warp looks up one bag; 7 rows, 2 rows (fewer than bags), and a table that this batch does not read."""
    monkeypatch.setattr(lookup_module, "bags_per_table", lambda *_: num_bags)
    sizes = [7, 2, 0, 4]
    lookup = lookup_of(("item", "tag", "shop", "brand"), torch.arange(13) * 3, sizes)
    assert lookup.stride() == num_bags and lookup.lengths().dtype == torch.int64
    lengths = lookup.lengths().view(4, num_bags)
    assert lengths.sum(1).tolist() == sizes == lookup.length_per_key()
    assert (lengths.max(1).values - lengths.min(1).values <= 1).all()
    rows = [lookup[table].values().tolist() for table in ("item", "tag", "shop", "brand")]
    assert rows == [list(range(0, 21, 3)), [21, 24], [], [27, 30, 33, 36]]


def test_a_lookup_of_no_table_is_empty():
    assert lookup_of((), torch.zeros(0, dtype=torch.int64), []).lengths().tolist() == []


@pytest.mark.parametrize(
    ("device_type", "world_size", "expected"),
    [("cpu", 8, 1), ("cuda", 1, 8192), ("cuda", 8, 8192), ("cuda", 64, 1024), ("cuda", 10**6, 1)],
)
def test_bags_fill_a_gpu_and_cost_many_ranks_no_more(device_type, world_size, expected):
    assert lookup_module.bags_per_table(device_type, world_size) == expected
