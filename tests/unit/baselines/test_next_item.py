"""Popularity as a next-item ranker, on histories whose ranks can be worked out by hand."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist import schema
from gpsd_dist.baselines.registry import evaluate_baseline

LISTS = pa.list_(pa.int64())
PRETRAIN = [[2, 2, 2, 3, 3], [4, 3, 2, 5]]  # events: item 2 four, 3 three, 4 and 5 one, 6 none


DAY = 86_400


def make(folder, history, candidate, label, times=None):
    """`times`: (of the pretraining histories, of the test histories, of the test requests), in days."""
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
    if times is not None:
        requests = pa.array([round(day * DAY) for day in times[2]], pa.int64())
        tables["test"] = tables["test"].append_column("request_time_s", requests)
        for table, days in zip(tables, times):
            seconds = [[None if day is None else round(day * DAY) for day in row] for row in days]
            tables[table] = tables[table].append_column("history.time_s", pa.array(seconds, LISTS))
            users = pa.array([index % 2 for index in range(len(seconds))], pa.int64())
            tables[table] = tables[table].append_column("user_hash", users)
    splits = []
    for name, table in tables.items():
        table = table.append_column("history_length", pa.array(lengths[name], pa.int32()))
        pq.write_table(table, folder / f"{name}.parquet")
        splits.append(schema.Split(name, (f"{name}.parquet",), len(table), 0, 0, None, None))
    splits.append(schema.Split("valid", (), 0, 0, 0, None, None))  # as --no_valid leaves it
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


TIMES = [[1, 2, 3, 8, 9], [9, 9.5, 9.9, 10]]  # 2 2 2 3 3 of user 0, 4 3 2 5 of user 1


@pytest.mark.parametrize(
    ("days", "target", "rank"),
    [
        (100, 2, 1),  # before day 10: item 2 four times, 3 three times
        (2, 3, 1),  # days 8 to 10: 3 three times, 2 and 4 once; the event of day 10 itself is not known yet
        (2, 4, 3),  # behind 3, and tied with 2: ties count against the target
        (1, 4, 3),  # days 9 to 10: 3 twice, then 2 and 4; the first day counts
        (0.5, 4, 5),  # 3 and 2 once; 4 ties with 5 and 6, which nobody took
    ],
)
def test_a_window_counts_events_strictly_before_the_request(tmp_path, days, target, rank):
    folder = make(tmp_path, [[]], [[target]], [[1.0]], (TIMES, [[]], [10]))
    assert metrics(folder, window_days=days)["mrr"] == pytest.approx(1 / rank)


def test_a_window_knows_earlier_targets_and_counts_an_event_of_several_splits_once(tmp_path):
    history, times = [PRETRAIN[0], [], PRETRAIN[0], []], [TIMES[0], [], TIMES[0], []]  # users 0, 1, 0, 1
    folder = make(tmp_path, history, [[6]] * 4, [[1.0]] * 4, (TIMES, times, [9.6, 9.65, 9.66, 9.7]))
    # The day before 9.6 has 3 twice, 4 once, and 6 not yet; user 0 has 3 already: behind 4, tied with 5.
    # At 9.65 item 6 has one event: behind 3, tied with 4. At 9.66 it has two, at 9.7 three; 3 would be before it
    # if the stored copies of its event at day 9 counted.
    assert metrics(folder, window_days=1)["mrr"] == pytest.approx((1 / 3 + 1 / 3 + 1 + 1) / 4)


def test_a_window_needs_times(tmp_path, caplog):
    nothing = [[None] * 5, [None] * 4]
    folder = make(tmp_path, [[]], [[3]], [[0.0]], (nothing, [[]], [10]))
    with pytest.raises(ValueError, match="needs the time of events"):
        metrics(folder, window_days=3)
    (tmp_path / "some").mkdir()
    folder = make(tmp_path / "some", [[]], [[3]], [[1.0]], ([nothing[0], TIMES[1]], [[]], [10]))
    with caplog.at_level("WARNING"):
        assert metrics(folder, window_days=3)["hr@1"] == 0  # 2, 3 and 4 once
    assert "5 tokens of the histories have no time" in caplog.text
