import math

import pytest

from gpsd_dist import schema
from tests.unit.data_pipeline.conftest import (
    APR_25_S,
    DAY_S,
    log_row,
    manifest_of,
    real_data,
    rows_of,
    run,
    words_of,
    write_log,
)


def decoded(out, split):
    """(user, request time from Apr 25, history items, behaviours, history times, candidates, clicks, tabs) per row."""
    items, behaviours, tabs = (words_of(out, name) for name in ("item", "behaviour", "tab"))
    return [
        (
            row["user_id"],
            row["request_time_s"] - APR_25_S,
            [items[index] for index in row["history.item"]],
            [behaviours[index] for index in row["history.behaviour"]],
            [None if time is None else time - APR_25_S for time in row["history.time_s"]],
            [items[index] for index in row["candidate.item"]],
            row["label.click"],
            [tabs[index] for index in row["candidate.tab"]],
        )
        for row in rows_of(out, split)
    ]


BASE, BASE_BEHAVIOUR = ["12", "10", "12"], ["watch", "long_view", "watch"]


def test_exposures_with_the_same_history_and_split_share_one_row(kuairand):
    assert decoded(kuairand, "train") == [
        # video 12 comes in the same second as the click on 11, so it does not see it
        ("1", 100, BASE, BASE_BEHAVIOUR, [None] * 3, ["10", "11", "12"], [0.0, 1.0, 0.0], ["1", "1", "2"]),
        ("1", 300, [*BASE, "11"], [*BASE_BEHAVIOUR, "long_view"], [None] * 3 + [200], ["13", "10"], [0, 0], ["1"] * 2),
        # the history of user 2 ends at 60 s: at 50 s nothing of it is known to be earlier
        ("2", 50, [], [], [], ["10"], [1.0], ["1"]),
        ("2", 1000, ["10", "11"], ["watch", "watch"], [50, None], ["11"], [0.0], ["1"]),
        ("3", 2000, [], [], [], ["12"], [0.0], ["1"]),
    ]
    assert decoded(kuairand, "valid") == [
        ("1", 4 * DAY_S, [*BASE, "11"], [*BASE_BEHAVIOUR, "long_view"], [None] * 3 + [200], ["11"], [1.0], ["1"])
    ]


def test_rows_of_the_test_day_see_the_clicks_of_valid_and_new_videos_are_unknown(kuairand):
    ((user, time, history, behaviours, times, candidates, _, _),) = decoded(kuairand, "test")
    assert (user, time, candidates) == ("1", 5 * DAY_S + 5, ["UNK"])
    assert history == [*BASE, "11", "11"]
    assert behaviours == [*BASE_BEHAVIOUR, "long_view", "watch"]
    assert times == [None, None, None, 200, 4 * DAY_S]


def test_attributes_labels_and_context(kuairand):
    row = rows_of(kuairand, "train")[0]
    tags, authors, durations = (words_of(kuairand, name) for name in ("tag", "author", "duration_bucket"))
    assert [sorted(tags[index] for index in bag) for bag in row["candidate.tag"]] == [["1", "2"], ["2"], ["UNK"]]
    assert [authors[index] for index in row["candidate.author"]] == ["70", "70", "71"]
    assert [durations[index] for index in row["candidate.duration_bucket"]] == ["0-7s", "10-15s", "UNK"]
    assert row["label.long_view"] == [0.0, 1.0, 0.0]
    assert [words_of(kuairand, "hour")[index] for index in row["candidate.hour"]] == ["0", "0", "0"]
    assert row["context.log_follow_user_num"] == pytest.approx(math.log(8))
    assert row["context.log_friend_user_num"] == 0.0  # -124 stands for missing
    assert row["context.log_history_len"] == pytest.approx(math.log(4))
    assert words_of(kuairand, "onehot_feat4")[row["context.onehot_feat4"]] == "1.0"
    stranger = rows_of(kuairand, "train")[-1]
    assert stranger["user_id"] == "3"
    assert stranger["context.onehot_feat4"] == schema.UNKNOWN_INDEX
    assert stranger["context.log_follow_user_num"] == 0.0


def daily_counts(shown, clicked, viewed):
    """log(1 + shown) and the smoothed log-odds, where 2 of 8 training rows are clicks and 1 of the 2 a long view."""
    return pytest.approx([math.log(1 + shown), math.log((clicked + 5) / (shown - clicked + 15)),
                          math.log((viewed + 10) / (clicked - viewed + 10))])  # fmt: skip


def test_counts_of_user_and_item_stop_at_the_midnight_before_the_request(kuairand):
    rows = [row for split in ("train", "valid", "test") for row in rows_of(kuairand, split) if row["user_id"] == "1"]
    names = ("log_exposures", "click_log_odds", "long_view_log_odds")
    users = [[row[f"context.user_{name}"] for name in names] for row in rows]
    # both train rows start on Apr 25, the first day of the log; valid is four days later, test five
    assert users == [daily_counts(0, 0, 0), daily_counts(0, 0, 0), daily_counts(5, 1, 1), daily_counts(6, 2, 1)]
    items = [list(zip(*(row[f"candidate.item_{name}"] for name in names))) for row in rows]
    # the second row shows video 13 on Apr 25 and video 10 on Apr 28, after two rows and a click on Apr 25
    assert [list(map(list, row)) for row in items[1:3]] == [
        [daily_counts(0, 0, 0), daily_counts(2, 1, 0)],
        [daily_counts(2, 1, 1)],
    ]


def test_watches_of_a_video_are_counted_in_the_histories(kuairand):
    row = rows_of(kuairand, "train")[0]
    assert row["candidate.log_watches"] == pytest.approx([math.log(2), math.log(2), math.log(3)])
    assert row["candidate.long_watch_ratio"] == pytest.approx([0.0, math.log(20 / 21), math.log(20 / 22)])


def test_pretrain_rows_are_the_histories_with_at_least_two_events(kuairand):
    items = words_of(kuairand, "item")
    rows = [(row["user_id"], [items[index] for index in row["history.item"]]) for row in rows_of(kuairand, "pretrain")]
    assert rows == [("1", BASE)]
    assert manifest_of(kuairand).skipped["repeated log rows (same user, video and time_ms)"] == 1


def test_rows_after_the_test_day_and_before_the_log_are_counted(kuairand_raw, tmp_path):
    rows = [log_row(1, 10, 6 * DAY_S), log_row(1, 10, -5 * DAY_S) | {"date": 20220420}]
    write_log(kuairand_raw / "log_standard_more.csv", rows)
    out = tmp_path / "out"
    assert run("--source", "kuairand_pure", "--raw_dir", kuairand_raw, "--out_dir", out) == 0
    skipped = manifest_of(out).skipped
    assert skipped["exposures after the test period"] == 1
    assert skipped["log rows dated before 20220425 (the histories stand for them)"] == 1


def test_duplicates_that_disagree_keep_the_higher_label(kuairand_raw, tmp_path):
    write_log(kuairand_raw / "log_again.parquet", [log_row(3, 12, 2000, click=1)])
    out = tmp_path / "out"
    assert run("--source", "kuairand_pure", "--raw_dir", kuairand_raw, "--out_dir", out) == 0
    assert next(row for row in rows_of(out, "train") if row["user_id"] == "3")["label.click"] == [1.0]


def test_label_outside_0_and_1_is_an_error(kuairand_raw, tmp_path, capsys):
    write_log(kuairand_raw / "log_standard.parquet", [log_row(1, 10, 5), log_row(1, 11, 6, click=2)])
    assert run("--source", "kuairand_pure", "--raw_dir", kuairand_raw, "--out_dir", tmp_path / "out") == 2
    assert (
        "log_standard.parquet, column 'is_click', data row 1: found '2', expected one of (0, 1)"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_real_kuairand_has_the_known_counts(tmp_path):
    out = tmp_path / "out"
    assert run("--source", "kuairand_pure", "--raw_dir", real_data("kuairand_pure"), "--out_dir", out) == 0
    manifest = manifest_of(out)
    counts = {split.name: split.num_candidates for split in manifest.splits}
    assert counts["train"] + counts["valid"] == 71_444
    assert counts["test"] == 20_361
    assert manifest.skipped["repeated log rows (same user, video and time_ms)"] == 94_784 - 91_805
    labels = [label for row in rows_of(out, "test") for label in row["label.click"]]
    assert sum(labels) / len(labels) == pytest.approx(0.473, abs=0.0005)
    clicked_long = [
        long for row in rows_of(out, "test") for click, long in zip(row["label.click"], row["label.long_view"]) if click
    ]
    assert len(clicked_long) == 9_630


def test_without_valid_its_rows_train_and_all_videos_may_have_an_index(kuairand_raw, kuairand, tmp_path):
    common = ("--source", "kuairand_pure", "--raw_dir", kuairand_raw, "--out_dir", tmp_path / "out")
    assert run(*common, "--no_valid", "--vocabulary", "all_items") == 0
    before, after = manifest_of(kuairand), manifest_of(tmp_path / "out")
    assert after.split("valid").num_rows == 0 and after.split("test") == before.split("test")
    both = before.split("train+valid")
    assert after.split("train").num_candidates == both.num_candidates and before.split("valid").num_rows
    assert set(words_of(tmp_path / "out", "item").values()) == {"PAD", "UNK", *map(str, range(10, 16))}
    assert "14" not in words_of(kuairand, "item").values()
