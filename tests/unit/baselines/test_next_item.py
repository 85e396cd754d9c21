"""Popularity as a next-item ranker, on histories whose ranks can be worked out by hand."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist import schema
from gpsd_dist.baselines.registry import evaluate_baseline

LISTS = pa.list_(pa.int64())
PRETRAIN = [[2, 2, 2, 3, 3], [4, 3, 2, 5]]  # events: item 2 four, 3 three, 4 and 5 one, 6 none


def make(folder, history, candidate, label):
    lengths = {"pretrain": [len(items) for items in PRETRAIN], "test": [len(items) for items in history]}
    tables = {
        "pretrain": pa.table({"history.item": pa.array(PRETRAIN, LISTS)}),
        "test": pa.table(
            {
                "history.item": pa.array(history, LISTS),
                "candidate.item": pa.array(candidate, LISTS),
                "label.click": pa.array(label, pa.list_(pa.float32())),
            }
        ),
    }
    splits = []
    for name, table in tables.items():
        table = table.append_column("history_length", pa.array(lengths[name], pa.int32()))
        pq.write_table(table, folder / f"{name}.parquet")
        splits.append(schema.Split(name, (f"{name}.parquet",), len(table), 0, 0, None, None))
    feature = schema.Feature("item", ("history", "candidate"), table="item")
    manifest = schema.Manifest(
        source="test",
        features=(feature,),
        tables=(schema.Table("item", 7, "0"),),
        tasks=(schema.Task("click"),),
        splits=tuple(splits),
        max_history_length=9,
        item_feature="item",
        split_rule="",
        skipped={},
        sources=(),
        options={},
        command="",
    )
    schema.write_manifest(manifest, folder)
    return folder


def metrics(folder, **cuts):
    return evaluate_baseline("next_item_popularity", folder, "test", **cuts)["next_item"]


@pytest.mark.parametrize(
    ("history", "target", "rank"),
    [
        ([], 2, 1),
        ([], 3, 2),
        ([2], 3, 1),  # what was seen does not compete
        ([3, 3], 4, 3),  # behind 2, and tied with 5: ties count against the target
        ([2, 3, 5], 6, 2),
        ([2], 2, 1),  # the target itself always competes
    ],
)
def test_the_rank_is_that_of_the_counts(tmp_path, history, target, rank):
    found = metrics(make(tmp_path, [history], [[6, target] if target != 6 else [5, 6]], [[0.0, 1.0]]))
    assert found["mrr"] == pytest.approx(1 / rank)
    assert found["hr@1"] == (rank == 1) and found["rows"] == 1


def test_every_positive_is_a_query_with_the_history_of_its_request(tmp_path):
    folder = make(tmp_path, [[2], [], [4, 5]], [[3, 6], [2], [6, 3]], [[1.0, 1.0], [0.0], [None, 1.0]])
    # 3 without 2: 1st; 6 without 2: behind 3, 4, 5; 3 without 4 and 5: behind 2
    assert metrics(folder)["mrr"] == pytest.approx((1 + 1 / 4 + 1 / 2) / 3)
    assert metrics(folder, rank_cut=2)["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize(("length", "ranks"), [(None, (1, 1, 1)), (3, (1, 1, 1)), (2, (2, 1, 2)), (1, (3, 1, 3))])
def test_events_that_a_model_does_not_see_compete(tmp_path, length, ranks):
    """Target 4, ranked behind 2 and 3 (and tied 5) unless they are excluded: as in scoring with MAX_HISTORY_LENGTH."""
    history = [[2, 3, 5], [], [2, 5, 3]]
    folder = make(tmp_path, history, [[4], [2], [4]], [[1.0], [1.0], [1.0]])
    found = metrics(folder, max_history_length=length)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 3)
