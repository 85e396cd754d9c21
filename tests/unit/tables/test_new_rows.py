"""Starting values of new rows against plain loops, and which rows keep their gradient."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gpsd_dist.batch.lookup import lookup_of
from gpsd_dist.tables import new_rows
from gpsd_dist.tables.new_rows import only_new_rows, shared_attributes, start_new_rows
from tests.helpers.synthetic import make_manifest

NUM_OLD, NUM_ROWS = 6, 10
CATEGORY = [2, 3, 2, 1, 2, 4, 1, 3]  # of rows 2 to 9; 1 is unknown, and 4 is new
TAGS = [[2], [3, 2], [], [1], [2, 3], [2, 9], [1], []]


def _write_items(path):
    table = {"index": range(2, NUM_ROWS), "category": CATEGORY, "tags": TAGS, "price": np.zeros(8, np.float32)}
    pq.write_table(pa.table({name: pa.array(column) for name, column in table.items()}), path)


def _expected(rows_DE: np.ndarray) -> np.ndarray:
    """Loops over new rows, attributes, values and old rows."""
    tags = [[category] for category in CATEGORY], TAGS
    start = []
    for new in range(NUM_OLD, NUM_ROWS):
        means = []
        for values in tags:
            of_values = []
            for value in values[new - 2]:
                alike = [row for row in range(2, NUM_OLD) if value in values[row - 2]]
                if value > 1 and alike:
                    of_values.append(rows_DE[alike].mean(axis=0))
            means += [np.mean(of_values, axis=0)] if of_values else []
        mean_E = rows_DE[2:NUM_OLD].mean(axis=0)
        start.append(rows_DE[1] + (np.mean(means, axis=0) - mean_E if means else 0))
    return np.stack(start)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_new_rows_start_like_others(tmp_path, scale):
    _write_items(tmp_path / "items.parquet")
    alike = shared_attributes(tmp_path / "items.parquet", make_manifest(), NUM_OLD)
    assert list(alike) == ["category", "tags"]
    weight = torch.randn(NUM_ROWS, 5, generator=torch.Generator().manual_seed(0)) * scale
    before = weight.clone()
    start_new_rows(weight, NUM_OLD, alike.values())
    assert torch.equal(weight[:NUM_OLD], before[:NUM_OLD])
    expected = torch.from_numpy(_expected(before.double().numpy())).float()
    assert (weight[NUM_OLD:] - expected).abs().max() <= 2.0**-23 * expected.abs().max()
    assert torch.equal(weight[8], before[1])  # all that is known of it is that nothing is


def test_without_attributes_a_new_row_is_the_unknown_row():
    weight = torch.arange(12.0).reshape(4, 3)
    start_new_rows(weight, 3)
    assert weight[3].tolist() == [3, 4, 5]


def test_a_shard_without_rows_adds_nothing(monkeypatch):
    weight = torch.randn(NUM_ROWS, 5, generator=torch.Generator().manual_seed(0))
    whole = weight.clone()
    start_new_rows(whole, NUM_OLD)
    monkeypatch.setattr(new_rows, "_shards", lambda weight: [(0, 0, weight), (NUM_ROWS, 0, weight[:0])])
    start_new_rows(weight, NUM_OLD)
    assert torch.equal(weight, whole)


def test_missing_items_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"items.parquet does not exist.*new_rows=unknown"):
        shared_attributes(tmp_path / "items.parquet", make_manifest(), NUM_OLD)


def test_old_rows_get_no_gradient():
    leaf = {name: torch.randn(3, 2, requires_grad=True) for name in ("item", "tag")}
    lookup = lookup_of(("item", "tag"), torch.tensor([1, 7, 5, 1, 7, 5]), [3, 3])
    cut = only_new_rows(leaf, lookup, {"item": 6, "other": 2})
    assert torch.equal(cut["item"], leaf["item"]) and cut["tag"] is leaf["tag"]
    (cut["item"] * 2).sum().backward()
    assert leaf["item"].grad.tolist() == [[0, 0], [2, 2], [0, 0]]
