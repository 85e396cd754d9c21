import math

import pyarrow.parquet as pq

from gpsd_dist import schema
from tests.unit.data_pipeline.conftest import manifest_of, real_data, rows_of, run, words_of


def test_rows_are_the_fixed_samples_with_everything_before_the_last_item(grocery):
    items, categories = words_of(grocery, "item"), words_of(grocery, "category")
    found = {}
    for split in ("train", "valid", "test"):
        for row in rows_of(grocery, split):
            history = [items[index] for index in row["history.item"]]
            candidates = [items[index] for index in row["candidate.item"]]
            found[row["user_id"]] = (split, history, candidates, row["request_time_s"], row["label.click"])
            assert [categories[index] for index in row["history.category"]] == [f"k{int(item) % 2}" for item in history]
    # the latest quarter of a, b, c, d is d; items 6 and 7 are targets of valid and test only, so they are unknown
    assert found == {
        "a": ("train", ["1", "2"], ["3", "5"], 30, [1.0, 0.0]),
        "b": ("train", ["2", "1"], ["4", "3"], 40, [1.0, 0.0]),
        "c": ("train", ["1", "3"], ["5", "2"], 50, [1.0, 0.0]),
        "d": ("valid", ["2"], ["UNK", "1"], 61, [1.0, 0.0]),
        "e": ("test", ["1", "2"], ["UNK", "3"], 90, [1.0, 0.0]),
        "f": ("test", ["3"], ["1", "2"], 95, [1.0, 0.0]),
    }


def test_a_known_category_of_an_unknown_item_is_kept(grocery):
    (row,) = rows_of(grocery, "valid")
    assert row["candidate.item"][0] == schema.UNKNOWN_INDEX
    assert words_of(grocery, "category")[row["candidate.category"][0]] == "k0"


def test_pretraining_holds_everything_but_the_last_item_of_all_users(grocery):
    items = words_of(grocery, "item")
    found = {row["user_id"]: [items[index] for index in row["history.item"]] for row in rows_of(grocery, "pretrain")}
    assert found == {"a": ["1", "2"], "b": ["2", "1"], "c": ["1", "3"], "e": ["1", "2"]}  # d and f have one event left
    assert manifest_of(grocery).skipped == {"users without a pretrain row (fewer than 2 events in it)": 2}


def test_vocabulary_counts_training_items_and_orders_them_by_count_then_id(grocery):
    vocab = pq.read_table(grocery / "vocab" / "item.parquet").to_pylist()
    # events before the last of all users, and the targets of a, b, c
    assert [(row["raw_id"], row["count"]) for row in vocab] == [("1", 4), ("2", 4), ("3", 3), ("4", 1), ("5", 1)]
    assert [row["index"] for row in vocab] == [2, 3, 4, 5, 6]


def test_longer_histories_keep_the_most_recent_events(grocery_raw, tmp_path):
    out = tmp_path / "short"
    options = ("--valid_fraction", 0.25, "--max_history_length", 2)
    lines = (grocery_raw / "interactions.csv").read_text().replace("a,1,k1,10\n", "a,7,k1,9\na,1,k1,10\n")
    (grocery_raw / "interactions.csv").write_text(lines)
    assert run("--source", "amazon_grocery", "--raw_dir", grocery_raw, "--out_dir", out, *options) == 0
    items = words_of(out, "item")
    row = next(row for row in rows_of(out, "train") if row["user_id"] == "a")
    assert [items[index] for index in row["history.item"]] == ["1", "2"]
    assert row["history_length"] == 2


def test_target_that_is_not_the_last_item_is_an_error(grocery_raw, tmp_path, capsys):
    path = grocery_raw / "samples.csv"
    path.write_text(path.read_text().replace("c,5,k1", "c,4,k0"))
    assert run("--source", "amazon_grocery", "--raw_dir", grocery_raw, "--out_dir", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "samples.csv, column 'target', data row 2: found '4', expected the last item of that user" in message
    assert not (tmp_path / "out").exists()


def test_real_grocery_has_the_official_counts(tmp_path):
    out = tmp_path / "out"
    raw = real_data("amazon_grocery")
    assert run("--source", "amazon_grocery", "--raw_dir", raw, "--out_dir", out) == 0
    manifest = manifest_of(out)
    num_valid = math.floor(0.15 * 10_318)
    counts = {split.name: split.num_rows for split in manifest.splits}
    assert counts == {"pretrain": 14_681, "train": 10_318 - num_valid, "valid": num_valid, "test": 4_363}
    assert manifest.table("item").num_rows == 8_713 + schema.NUM_RESERVED_ROWS  # every item occurs in training
    assert manifest.split("test").num_candidates == 8_726
