"""Boosted trees: what they find, what they cannot see, and the features that they get."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist import evaluate, schema
from gpsd_dist.baselines import gbdt, gbdt_features
from tests.helpers.synthetic import write_dataset

ROWS = {"pretrain": 100, "train": 500, "valid": 200, "test": 300}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Users prefer one category; its candidates are clicked with 0.85 instead of 0.15."""
    folder = tmp_path_factory.mktemp("planted")
    write_dataset(folder, seed=0, num_rows=ROWS, num_files=1)
    return folder


@pytest.fixture
def small(tmp_path):
    """Few rows, for exact comparisons; requests share seconds and ids are rare enough to repeat."""
    manifest = write_dataset(
        tmp_path, seed=1, num_rows=40, num_files=1, table_rows={"item": 150, "tag": 20}, max_history_length=6
    )

    def coarse_time(table):
        return pa.array([time_s // 7200 * 7200 for time_s in table["request_time_s"].to_pylist()], pa.int64())

    for split in ("train", "valid", "test"):
        change(tmp_path, split, "request_time_s", coarse_time)
    return tmp_path, manifest


def change(data_dir, split, column, make):
    """Replaces a column of a split by `make(table)`."""
    path = data_dir / split / "part-00000.parquet"
    table = pq.read_table(path)
    new = make(table)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, new), path)


def shuffled_labels(seed):
    """The observed labels of a split, dealt out anew."""

    def make(table):
        lists = table["label.click"].to_pylist()
        values = np.random.default_rng(seed).permutation([value for row in lists for value in row]).tolist()
        return pa.array([[values.pop() for _ in row] for row in lists], pa.list_(pa.float32()))

    return make


def score(data_dir, split="test", task="click", **options):
    return gbdt.score_gbdt(data_dir, schema.read_manifest(data_dir), split, task, **options)


def with_rate(data_dir, rate):
    """Says that the log kept that share of the negatives."""
    manifest = schema.read_manifest(data_dir)
    for split in ("train", "valid", "test"):
        path = data_dir / split / "part-00000.parquet"
        table = pq.read_table(path)
        lists = [[rate for _ in row] for row in table["candidate.item"].to_pylist()]
        pq.write_table(table.append_column("sampling.negative_rate", pa.array(lists, pa.list_(pa.float32()))), path)
    schema.write_manifest(dataclasses.replace(manifest, sampling=("negative_rate",)), data_dir)


# ---- what they learn ------------------------------------------------------------------------------------------------


def test_trees_of_a_sampled_log_give_probabilities_of_the_whole_log(small):
    folder, _ = small
    plain = score(folder).arrays()[0]
    with_rate(folder, 0.1)
    metrics, shift = score(folder).metrics(), score(folder).arrays()[0].mean() - plain.mean()
    assert 0.7 < metrics["calibration"] < 1.4 and -3.5 < shift < -1.2  # ln 0.1 = -2.3; without weights 0.0, and above 2


@pytest.mark.parametrize("split", ["valid", "test"])
def test_planted_signal_is_found(planted, split):
    assert score(planted, split).metrics()["auc"] > 0.8  # the truth has 0.85: its classes overlap


def test_shuffled_labels_give_no_signal(tmp_path):
    write_dataset(tmp_path, seed=0, num_rows=ROWS | {"test": 800}, num_files=1)
    for seed, split in enumerate(("train", "valid", "test")):
        change(tmp_path, split, "label.click", shuffled_labels(seed))
    metrics = score(tmp_path).metrics()
    assert abs(metrics["auc"] - 0.5) < 0.06  # four standard errors of the AUC of 2,000 rows


@pytest.mark.parametrize(("split", "unseen"), [("valid", ["valid"]), ("test", ["test"])])
def test_scores_do_not_depend_on_labels_of_the_scored_split(tmp_path, split, unseen):
    write_dataset(tmp_path, seed=0, num_rows=ROWS, num_files=1)
    before_N, label_N, *_ = score(tmp_path, split).arrays()
    for name in unseen:
        change(
            tmp_path,
            name,
            "label.click",
            lambda t: pa.array(
                [[1.0 - v if v is not None else None for v in row] for row in t["label.click"].to_pylist()],
                pa.list_(pa.float32()),
            ),
        )
    after_N, flipped_N, *_ = score(tmp_path, split).arrays()
    assert (flipped_N == 1 - label_N).all()
    np.testing.assert_array_equal(after_N, before_N)


def test_refit_learns_from_valid_too(planted, monkeypatch):
    fitted = []
    monkeypatch.setattr(
        gbdt, "_boost", lambda fit, *a, inner=gbdt._boost, **k: fitted.append(fit) or inner(fit, *a, **k)
    )
    metrics = score(planted, refit=True).metrics()
    train, both = fitted
    manifest = schema.read_manifest(planted)
    valid = gbdt_features.read_examples(planted, manifest, "valid", "click")
    assert len(both.label_N) == len(train.label_N) + len(valid.label_N)
    assert both.time_s_N.max() == valid.time_s_N.max() and metrics["auc"] > 0.8


def test_same_seed_gives_the_same_bits_on_any_number_of_threads_and_another_seed_does_not(planted, monkeypatch):
    monkeypatch.setattr(gbdt, "MAX_TREES", 20)
    one_N = score(planted, seed=3).arrays()[0]
    np.testing.assert_array_equal(score(planted, seed=3, num_threads=2).arrays()[0], one_N)
    assert (score(planted, seed=4).arrays()[0] != one_N).any()


def test_conditional_task_is_trained_and_scored_where_the_condition_holds(planted):
    table = pq.read_table(planted / "test" / "part-00000.parquet")
    pairs = [
        pair
        for click, buy in zip(table["label.click"].to_pylist(), table["label.buy"].to_pylist(), strict=True)
        for pair in zip(click, buy, strict=True)
    ]
    expected = [buy for click, buy in pairs if click == 1 and buy is not None]
    assert score(planted, task="buy").arrays()[1].tolist() == expected
    fit = gbdt_features.read_examples(planted, schema.read_manifest(planted), "train", "buy")
    assert len(fit.label_N) < sum(len(row) for row in pq.read_table(planted / "train")["label.buy"].to_pylist())


def test_command_line_scores_every_task(planted, tmp_path, capsys):
    options = ["--baseline", "gbdt", "--data", str(planted), "--metrics_out", str(tmp_path / "m.json")]
    assert evaluate.main(options) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert list(metrics) == ["click", "buy"] and metrics["click"]["auc"] > 0.8
    assert evaluate.main([*options, "--split", "train"]) == 2
    assert "cannot be scored" in capsys.readouterr().err


# ---- features -------------------------------------------------------------------------------------------------------


def features(examples, counted):
    matrix_NF, names = gbdt_features.matrix(examples, counted)
    return {name: matrix_NF[:, index] for index, name in enumerate(names)}


def test_a_label_changes_later_rows_only(small):
    data_dir, manifest = small
    fit = gbdt_features.read_examples(data_dir, manifest, "train", "click")
    before_NF, _ = gbdt_features.matrix(fit, counted=fit)
    later_changes = 0
    for row in range(len(fit.label_N)):
        label_N = fit.label_N.copy()
        label_N[row] ^= 1
        flipped = dataclasses.replace(fit, label_N=label_N)
        after_NF, _ = gbdt_features.matrix(flipped, counted=flipped)
        has_changed_N = ~((after_NF == before_NF) | np.isnan(before_NF)).all(axis=1)
        assert not has_changed_N[fit.time_s_N <= fit.time_s_N[row]].any()  # itself, its request, its second, the past
        later_changes += has_changed_N.sum()
    assert later_changes > 0


def earlier_rate(values, labels, times, wanted, before):
    """(rows, smoothed rate) by plain loops: rows earlier than `before` that hold `wanted`, once per occurrence."""
    found = [(label, time) for bag, label, time in zip(values, labels, times) for value in bag if value == wanted]
    seen = [label for label, time in found if time < before]
    past = [label for label, time in zip(labels, times) if time < before]
    prior = (sum(past) + 10) / (len(past) + 20)
    rate = (sum(seen) + 20 * prior) / (len(seen) + 20)
    return len(seen), np.log(rate / (1 - rate)) - np.log(prior / (1 - prior))


@pytest.mark.parametrize("scored_split", ["train", "test"])
@pytest.mark.parametrize("key", ["candidate.item", "candidate.tags", "context.interests", "user"])
def test_label_rates_equal_plain_loops(small, key, scored_split):
    data_dir, manifest = small
    fit, scored = (gbdt_features.read_examples(data_dir, manifest, s, "click") for s in ("train", scored_split))
    made = features(scored, fit)

    def bags(examples):
        return np.split(examples.keys[key].value_M, np.cumsum(examples.keys[key].length_N)[:-1])

    labels, times = fit.label_N.astype(int).tolist(), fit.time_s_N.tolist()
    for row, (bag, time_s) in enumerate(zip(bags(scored), scored.time_s_N.tolist(), strict=True)):
        found = [earlier_rate(bags(fit), labels, times, value, time_s) for value in bag]
        rows_of, log_odds = zip(*found) if found else ([], [])
        assert made[f"{key}:log_count"][row] == pytest.approx(
            np.mean(np.log1p(rows_of)) if found else np.nan, nan_ok=True
        )
        expected = np.mean(log_odds) if found else np.nan
        assert made[f"{key}:log_odds"][row] == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_small_vocabularies_are_categories_and_large_ones_and_bags_are_rated(small):
    data_dir, manifest = small
    examples = gbdt_features.read_examples(data_dir, manifest, "train", "click")
    assert examples.categories == {"candidate.category", "candidate.tab", "context.segment"}
    assert set(examples.keys) == {"user", "candidate.item", "candidate.tags", "context.interests"}
    assert {"candidate.price", "candidate.discount", "context.age", "candidate.tags:size"} <= set(examples.columns)


def test_history_matches_by_hand(tmp_path):
    manifest = write_dataset(tmp_path, seed=1, num_rows=20, num_files=1, max_history_length=6)
    columns = {
        "history.item": [[5, 7, 5, 9], [], [1, 6]],
        "history.tags": [[[2, 3], [4], [], [3]], [], [[1], [8, 2]]],
        "candidate.item": [[5, 9, 8], [5], [1, 6]],
        "candidate.tags": [[[3, 4], [], [9]], [[3]], [[1], [2, 8]]],
        "history.category": [[2, 3, 2, 3], [], [4, 4]],
        "candidate.category": [[2, 2, 2], [2], [4, 3]],
    }
    for place, counts in (("history", [4, 0, 2]), ("candidate", [3, 1, 2])):
        columns[f"{place}.price"] = [[0.0] * count for count in counts]
    table = pq.read_table(tmp_path / "train" / "part-00000.parquet").slice(0, 3)
    columns |= {name: [[1.0] * n for n in (3, 1, 2)] for name in ("label.click", "label.buy", "candidate.discount")}
    columns |= {"candidate.tab": [[2] * n for n in (3, 1, 2)]}
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table(table, tmp_path / "train" / "part-00000.parquet")
    splits = tuple(dataclasses.replace(s, num_rows=3) if s.name == "train" else s for s in manifest.splits)
    manifest = dataclasses.replace(manifest, splits=splits)
    made = gbdt_features.read_examples(tmp_path, manifest, "train", "click").columns
    nan = np.nan
    np.testing.assert_array_equal(made["history:length"], [4, 4, 4, 0, 2, 2])
    np.testing.assert_array_equal(made["item:history_matches"], [2, 1, 0, 0, 0, 1])  # 1 is unknown: no match
    np.testing.assert_array_equal(made["item:history_age"], [2, 1, nan, nan, nan, 1])
    np.testing.assert_array_equal(made["item:history_share"], [0.5, 0.25, 0, 0, 0, 0.5])
    np.testing.assert_array_equal(made["tags:history_matches"], [2, nan, 0, 0, 0, 1])  # tag 3 twice; an empty bag
    np.testing.assert_array_equal(made["tags:history_age"], [1, nan, nan, nan, nan, 1])
    np.testing.assert_array_equal(made["category:history_age"], [2, 2, 2, nan, 1, nan])


def test_popularity_is_the_log_count_in_pretraining_histories(small):
    data_dir, manifest = small
    histories = pq.read_table(data_dir / "pretrain")["history.item"].to_pylist()
    table = pq.read_table(data_dir / "test" / "part-00000.parquet")
    labels, items = ([v for row in table[c].to_pylist() for v in row] for c in ("label.click", "candidate.item"))
    expected = [
        np.log1p(sum(history.count(item) for history in histories))
        for item, label in zip(items, labels, strict=True)
        if label is not None
    ]
    made = gbdt_features.read_examples(data_dir, manifest, "test", "click").columns["item:log_popularity"]
    np.testing.assert_allclose(made, expected, rtol=1e-6)


# ---- what they refuse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "task", "message"),
    [
        ("train", "click", "'train' cannot be scored"),
        ("test", "like", "no task 'like'"),
        ("holdout", "click", "no split 'holdout'"),
    ],
)
def test_bad_requests_raise(small, split, task, message):
    with pytest.raises(ValueError, match=message):
        score(small[0], split, task)


@pytest.mark.parametrize(
    ("changed", "scored", "value", "message"),
    [
        ("train", "test", 1.0, r"split 'train' has (\d+) positives of \1 rows"),
        ("valid", "test", 0.0, r"split 'valid' has 0 positives of \d+ rows"),
        ("valid", "test", None, "split 'valid' of .* has no candidate with an observed label of task 'click'"),
        ("test", "test", None, "split 'test' of .* has no candidate with an observed label of task 'click'"),
        ("train", "valid", 0.0, "the earlier part of 'train' has 0 positives"),
    ],
)
def test_missing_classes_and_labels_are_named(small, changed, scored, value, message):
    data_dir, _ = small
    change(
        data_dir,
        changed,
        "label.click",
        lambda t: pa.array([[value] * len(row) for row in t["label.click"].to_pylist()], pa.list_(pa.float32())),
    )
    with pytest.raises(ValueError, match=message):
        score(data_dir, scored)


def test_split_without_rows_is_named(small):
    data_dir, _ = small
    path = data_dir / "valid" / "part-00000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(ValueError, match=r"(?s)split 'valid' of .* is empty: it has columns but no rows"):
        score(data_dir)


def test_valid_needs_a_latest_part_of_train(small):
    data_dir, _ = small
    change(data_dir, "train", "request_time_s", lambda t: pa.array([5] * len(t), pa.int64()))
    with pytest.raises(ValueError, match="all requests of 'train' are of one time"):
        score(data_dir, "valid")
    assert len(score(data_dir, "test")) > 0
