"""The rules for logs without labels, on logs made in memory and run through the engine."""

import argparse
import collections

import ibis
import numpy as np
import pytest

from data_pipeline import canonical, engine, hashing, negatives, splits, vocab
from gpsd_dist import schema


@pytest.fixture
def running(tmp_path):
    opened = engine.Engine("duckdb", tmp_path, "1GB", 1)
    yield opened
    opened.close()


def make_log(running, rows, rule) -> canonical.Log:
    """rows: (user, item, time)."""
    columns = {"user_id": "string", "item_id": "string", "time_s": "int64", "order": "int64"}
    data = [(user, item, time, place) for place, (user, item, time) in enumerate(rows)]
    events = running.con.create_table("made", ibis.memtable(data, schema=columns))
    return canonical.Log(
        events=events,
        items=events.select("item_id").distinct(),
        features=(canonical.FeatureSpec("item", ("history", "candidate"), "item_id"),),
        split=rule,
        order_words="by time, then as given",
    )


def requests_of(cut) -> list[tuple]:
    table = cut.candidates.execute()
    return sorted(zip(table.user_id, table.split, table.num_before, table.item_id, table.time_s))


def test_last_item_by_time(running):
    users = [(f"u{n}", 10 * n) for n in range(10)]
    rows = [(user, item, time + step) for user, time in users for step, item in enumerate(["a", "b", "c"])]
    log = make_log(
        running, [*rows, ("short", "a", 5)], canonical.LastItemByTime(train_quantile=0.7, valid_fraction=0.3)
    )
    events = splits.number_events(running, log)
    cut = splits.cut(running, log, events, is_holdout=False)
    # 7 of 10 users end at or before the quantile; the latest 2 (= 0.3 of 7, rounded down) of them are valid
    names = ["train"] * 5 + ["valid"] * 2 + ["test"] * 3
    assert requests_of(cut) == [(f"u{n}", name, 2, "c", 10 * n + 2) for n, name in enumerate(names)]
    assert set(cut.pretrain.num_events.execute()) == {2}
    assert cut.training_events.count().execute() == 10 * 2 + 5  # all but the last of everyone, and the train targets
    assert cut.skipped == {"events of users with fewer than 2 events": 1}


def test_leave_last_out(running):
    rows = [("a", item, n) for n, item in enumerate("pqrst")] + [("b", item, n) for n, item in enumerate("xyz")]
    log = make_log(running, [*rows, ("c", "p", 1), ("c", "q", 1)], canonical.LeaveLastOut())
    cut = splits.cut(running, log, splits.number_events(running, log), is_holdout=False)
    assert requests_of(cut) == [
        ("a", "test", 4, "t", 4),
        ("a", "train", 2, "r", 2),
        ("a", "valid", 3, "s", 3),
        ("b", "test", 2, "z", 2),
        ("b", "valid", 1, "y", 1),
    ]
    assert cut.pretrain.execute().values.tolist() == [["a", 3]]
    assert sum(cut.skipped.values()) == 2 + 1  # both events of c; user b has no train request


def test_leave_last_out_without_valid_trains_up_to_the_test_event(running):
    rows = [("a", item, n) for n, item in enumerate("pqrst")] + [("b", item, n) for n, item in enumerate("xy")]
    log = make_log(running, [*rows, ("c", "p", 1)], canonical.LeaveLastOut(has_valid=False))
    cut = splits.cut(running, log, splits.number_events(running, log), is_holdout=False)
    assert requests_of(cut) == [("a", "test", 4, "t", 4), ("a", "train", 3, "s", 3), ("b", "test", 1, "y", 1)]
    assert cut.pretrain.execute().values.tolist() == [["a", 4]]
    assert sorted(cut.training_events.item_id.execute()) == ["p", "q", "r", "s", "x"]
    assert sum(cut.skipped.values()) == 1 + 1  # the event of c; user b has no train request
    assert "no valid" in cut.words


def test_equal_times_follow_the_order_column(running):
    log = make_log(running, [("a", "z", 5), ("a", "y", 5), ("a", "x", 5)], canonical.LastItemByTime())
    events = splits.number_events(running, log).execute().sort_values("rank")
    assert events.item_id.tolist() == ["z", "y", "x"]


def test_user_hash_is_sixty_bits_and_known(running):
    table = running.con.create_table("named", ibis.memtable({"user_id": ["1", "2", "1"]}))
    found = table.mutate(hash=hashing.user_hash(table.user_id)).execute()["hash"].tolist()
    assert found[0] == found[2] == int("c4ca4238a0b923820dcc509a6f75849b"[:15], 16)
    assert found[1] == int("c81e728d9d4c2f636f067f89cc14862c"[:15], 16)


def test_vocabulary_respects_min_count(running):
    counted = ibis.memtable({"raw_id": ["b", "a", "c", "a", None], "count": [2, 1, 1, 1, 9]})
    found = vocab.build(running, "item", counted, min_count=2).order_by("index").execute()
    assert found.raw_id.tolist() == ["a", "b"]
    assert found["index"].tolist() == [2, 3]


def draw(running, distribution: str, num_users: int, num_items: int, per_positive: int):
    """(drawn: array [user, k] of item numbers, history item per user, positive per user)."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(num_users):
        first, second = rng.choice(num_items, 2, replace=False)
        rows += [(f"u{user}", f"{first}", 1), (f"u{user}", f"{second}", 2)]
    log = make_log(running, rows, canonical.LastItemByTime())
    events = splits.number_events(running, log)
    cut = splits.cut(running, log, events, is_holdout=False)
    counts = {
        "raw_id": [f"{item}" for item in range(num_items)],
        "count": [num_items - item for item in range(num_items)],
    }
    options = argparse.Namespace(negatives=distribution, num_negatives=per_positive, seed=0)
    both, skipped = negatives.add(running, log, cut.candidates, events, ibis.memtable(counts), options)
    assert not skipped
    table = both.execute().sort_values(["user_id", "position"])
    shape = (num_users, per_positive + 1)
    assert table["click"].to_numpy().reshape(shape)[:, 0].all()
    assert not table["click"].to_numpy().reshape(shape)[:, 1:].any()
    assert (table["position"].to_numpy().reshape(shape) == np.arange(per_positive + 1)).all()
    items = table["item_id"].astype(int).to_numpy().reshape(shape)
    histories = {user: int(item) for user, item, time in rows if time == 1}
    return (
        items[:, 1:],
        np.array([histories[user] for user in table["user_id"].to_numpy()[:: per_positive + 1]]),
        items[:, 0],
    )


def test_uniform_negatives_are_uniform_independent_and_new(running):
    num_items, per_positive = 50, 4
    drawn, history, positive = draw(running, "uniform", 4000, num_items, per_positive)
    assert (drawn != history[:, None]).all()
    assert (drawn != positive[:, None]).all()
    assert all(len(set(row)) == per_positive for row in drawn.tolist())
    for k in range(per_positive):
        counts = np.bincount(drawn[:, k], minlength=num_items)
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi_square < 49 + 4 * np.sqrt(2 * 49)  # mean 49, standard deviation 9.9
    correlation = np.corrcoef(drawn.T) - np.eye(per_positive)
    # drawn without repeats, two of them correlate by about -1/(n-1) = -0.02; the noise of 4,000 users is 0.016
    assert np.abs(correlation).max() < 0.02 + 4 * 0.016
    assert abs(np.corrcoef(drawn[:, 0], positive)[0, 1]) < 0.02 + 4 * 0.016


def test_popular_negatives_follow_the_counts_and_reach_rare_items(running):
    num_items = 50
    drawn, _, _ = draw(running, "popularity", 4000, num_items, 4)
    counts = np.bincount(drawn.ravel(), minlength=num_items)
    expected = np.arange(num_items, 0, -1) / (num_items * (num_items + 1) / 2) * drawn.size
    assert counts.min() > 0
    assert np.corrcoef(counts, expected)[0, 1] > 0.98


def test_every_item_has_a_slot_however_rare(running):
    counted = ibis.memtable({"raw_id": ["common", "rare"], "count": [10**9, 1]})
    table, num_slots = negatives.slots(running, vocab.build(running, "item", counted, 1), "popularity")
    slots = collections.Counter(table.item_id.execute())
    assert slots["rare"] == 1
    assert slots["common"] + 1 == num_slots
    assert sorted(table.slot.execute())[:: num_slots - 1] == [0, num_slots - 1]


def test_a_user_who_has_met_everything_is_counted(running):
    log = make_log(running, [("a", "x", 1), ("a", "y", 2), ("b", "x", 1), ("b", "z", 2)], canonical.LastItemByTime())
    events = splits.number_events(running, log)
    cut = splits.cut(running, log, events, is_holdout=False)
    counts = ibis.memtable({"raw_id": ["x", "y", "z"], "count": [1, 1, 1]})
    options = argparse.Namespace(negatives="uniform", num_negatives=2, seed=0)
    both, skipped = negatives.add(running, log, cut.candidates, events, counts, options)
    assert list(skipped.values()) == [2]  # only one item is left for either user
    assert both.count().execute() == 4


def test_being_new_does_not_give_the_label_away(running):
    """A third of the items first occurs after the training period: they are drawn for later requests, not in training,
    and as often as uniform draws must.
    """
    num_users, new_items = 3000, [f"new{n}" for n in range(20)]
    rng = np.random.default_rng(0)
    rows = []
    for user in range(num_users):
        first, second = (f"{item}" for item in rng.choice(40, 2, replace=False))
        is_late = user >= num_users * 7 // 10
        rows += [(f"u{user}", first, user), (f"u{user}", rng.choice(new_items) if is_late else second, user + 1)]
    log = make_log(running, rows, canonical.LastItemByTime(valid_fraction=0.0))
    events = splits.number_events(running, log)
    cut = splits.cut(running, log, events, is_holdout=False)
    options = argparse.Namespace(negatives="uniform", num_negatives=1, seed=0)
    counts = cut.training_events.group_by(raw_id="item_id").agg(count=ibis._.count())
    both, skipped = negatives.add(running, log, cut.candidates, events, counts, options)
    assert not skipped
    drawn = both.filter(both["click"] == 0).execute()
    is_new = drawn.item_id.isin(new_items)
    assert not is_new[drawn.split == "train"].any()
    share, num_test = is_new[drawn.split == "test"].mean(), (drawn.split == "test").sum()
    assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / num_test)
    assert num_test > 800


def test_rare_items_are_drawn_in_training_too(running):
    """An item below --min_count is unknown as a positive, so it must be possible as a negative."""
    rows = [(f"u{user}", item, time) for user in range(300) for time, item in ((1, "a"), (2, f"rare{user}"))]
    log = make_log(running, rows, canonical.LastItemByTime())
    events = splits.number_events(running, log)
    cut = splits.cut(running, log, events, is_holdout=False)
    options = argparse.Namespace(negatives="uniform", num_negatives=1, seed=0)
    counts = cut.training_events.group_by(raw_id="item_id").agg(count=ibis._.count())
    both, _ = negatives.add(running, log, cut.candidates, events, counts, options)
    train = both.filter((both.split == "train") & (both["click"] == 0)).execute()
    assert train.item_id.str.startswith("rare").all()
    assert train.item_id.nunique() > 50


def test_specs_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="origin 'nowhere' is not one of"):
        canonical.FeatureSpec("x", ("history",), "nowhere")
    with pytest.raises(ValueError, match="only place 'context'"):
        canonical.FeatureSpec("x", ("history",), "users")
    with pytest.raises(ValueError, match="a bag must be an item attribute"):
        canonical.FeatureSpec("x", ("candidate",), "log", is_bag=True)


def test_a_log_without_a_promised_column_is_an_error(running):
    log = make_log(running, [("a", "x", 1)], canonical.LeaveLastOut())
    extra = canonical.FeatureSpec("shop", ("history",), "log")
    broken = canonical.Log(log.events, log.items, (*log.features, extra), log.split, "")
    with pytest.raises(ValueError, match="table 'events' has no column 'shop'"):
        canonical.checked(broken)
    timed = canonical.Log(log.events, log.items, log.features, canonical.TimeBoundaries(1, 2), "")
    with pytest.raises(ValueError, match="needs a log with exposures"):
        canonical.checked(timed)
    assert schema.UNKNOWN_INDEX == 1
