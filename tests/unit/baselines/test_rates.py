"""Baselines on a small prepared data set whose rates can be worked out by hand."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpsd_dist import schema
from gpsd_dist.baselines import rates
from gpsd_dist.baselines.frequent_items import frequent_item_metrics
from gpsd_dist.baselines.registry import evaluate_baseline
from gpsd_dist.data.split_batches import pretrain_counts
from gpsd_dist.metrics.classification import Predictions

_HISTORY = {"pretrain": [[2, 2, 3], [4], []]}
_ROWS = {  # user_hash, items, tabs, click, buy (given click; None: not observed)
    "train": [
        (7, [2, 3], [2, 2], [1.0, 0.0], [1.0, None]),
        (-9, [2], [3], [1.0], [0.0]),
        (7, [4], [2], [0.0], [1.0]),  # a purchase without click is outside the condition
    ],
    "valid": [(5, [3, 2, 4], [2, 3, 3], [1.0, None, 0.0], [1.0, None, None])],
    "test": [(7, [2, 9], [2, 4], [1.0, 0.0], [1.0, None]), (8, [3], [2], [0.0], [None])],
}


@pytest.fixture
def data_dir(tmp_path):
    splits = []
    for name in ("pretrain", *_ROWS):
        (tmp_path / name).mkdir()
        file = f"{name}/part-00000.parquet"
        if name == "pretrain":
            lengths = pa.array(map(len, _HISTORY["pretrain"]), pa.int32())
            items = pa.array(_HISTORY["pretrain"], pa.list_(pa.int64()))
            table = pa.table({"history_length": lengths, "history.item": items})
        else:
            user, item, tab, click, buy = zip(*_ROWS[name])
            table = pa.table(
                {
                    "user_hash": pa.array(user, pa.int64()),
                    "history_length": pa.array([0] * len(user), pa.int32()),
                    "request_time_s": pa.array([86_400] * len(user), pa.int64()),
                    "candidate.item": pa.array(item, pa.list_(pa.int64())),
                    "candidate.tab": pa.array(tab, pa.list_(pa.int64())),
                    "candidate.tag": pa.array([[[1]] * len(i) for i in item], pa.list_(pa.list_(pa.int64()))),
                    "context.hour": pa.array(range(1, 1 + len(user)), pa.int64()),
                    "label.click": pa.array(click, pa.list_(pa.float32())),
                    "label.buy": pa.array(buy, pa.list_(pa.float32())),
                }
            )
        pq.write_table(table, tmp_path / file, row_group_size=2)
        splits.append(schema.Split(name, (file,), len(table), 0, 0, None, None))
    schema.write_manifest(
        schema.Manifest(
            source="test",
            features=(
                schema.Feature("item", ("history", "candidate"), table="item"),
                schema.Feature("tab", ("candidate",), table="tab"),
                schema.Feature("tag", ("candidate",), table="tag", is_bag=True),
                schema.Feature("hour", ("context",), table="hour"),
            ),
            tables=tuple(schema.Table(name, 10, "0") for name in ("item", "tab", "tag", "hour")),
            tasks=(schema.Task("click"), schema.Task("buy", given="click")),
            splits=tuple(splits),
            max_history_length=9,
        ),
        tmp_path,
    )
    return tmp_path


def sampled(data_dir, **values):
    """Adds sampling columns: one value for every candidate, or name -> {split: lists}."""
    manifest = schema.read_manifest(data_dir)
    for name in _ROWS:
        path = data_dir / name / "part-00000.parquet"
        table = pq.read_table(path)
        for column, given in values.items():
            lists = given.get(name) if isinstance(given, dict) else None
            lists = lists or [[1.0 if isinstance(given, dict) else given for _ in row[1]] for row in _ROWS[name]]
            table = table.append_column(f"sampling.{column}", pa.array(lists, pa.list_(pa.float32())))
        pq.write_table(table, path, row_group_size=2)
    manifest = dataclasses.replace(manifest, sampling=tuple(values))
    schema.write_manifest(manifest, data_dir)
    return manifest


def test_the_scale_of_weights_changes_nothing(data_dir):
    plain = rates.score_rates(data_dir, schema.read_manifest(data_dir), "test", "click").arrays()[0]
    assert (rates.score_rates(data_dir, sampled(data_dir, weight=7.0), "test", "click").arrays()[0] == plain).all()


def test_weights_count_rows_and_sampled_negatives_stand_for_several(data_dir, monkeypatch):
    """Fit rows of click: 1, 0 | 1 | 0 in train, 1, 0 in valid; their users 7, 7, -9, 7, 5, 5."""
    monkeypatch.setattr(rates, "PSEUDO_COUNTS", 4)
    manifest = sampled(data_dir, weight={"train": [[1.0, 1.0], [0.0], [1.0]]}, negative_rate=0.5)
    score_N = rates.score_rates(data_dir, manifest, "test", "click", keys=("user",)).arrays()[0]
    share = 2 / 8  # of the whole log: one positive of user 7, one of user 5, and three negatives that stand for two
    rows, positive = (1 + 2 + 2) / 1.6, 1 / 1.6  # the five rows that count have 8 / 5 on average
    seven = (positive + 4 * share) / (rows + 4)
    assert score_N == pytest.approx([_log_odds(seven)] * 2 + [_log_odds(share)], abs=1e-6)
    metrics = evaluate_baseline("rates", data_dir, "test", ["click"])["click"]
    assert metrics["label_rate"] == 1 / 5 and metrics["rows"] == 3  # a positive, and two negatives of two each


def test_metrics_of_baselines_take_weights_where_asked(data_dir):
    sampled(data_dir, weight={"test": [[3.0, 1.0], [1.0]]})
    found = [evaluate_baseline("popularity", data_dir, "test", ["click"], is_weighted=flag) for flag in (False, True)]
    assert [metrics["click"]["label_rate"] for metrics in found] == [pytest.approx(1 / 3), 3 / 5]
    sampled(data_dir)
    with pytest.raises(ValueError, match="has no weights"):
        evaluate_baseline("popularity", data_dir, "test", ["click"], is_weighted=True)


def _log_odds(rate):
    return np.log(rate / (1 - rate))


def test_rates_are_smoothed_log_odds_summed_over_keys(data_dir, monkeypatch):
    monkeypatch.setattr(rates, "PSEUDO_COUNTS", 4)
    manifest = schema.read_manifest(data_dir)
    fitted = rates.score_rates(data_dir, manifest, "test", "click")
    score_N, label_N, user_N, day_N, item_N = fitted.arrays()[:5]
    prior = 3 / 6  # six observed candidates in train and valid, three clicks
    item_2, item_3 = (2 + 2) / (2 + 4), (1 + 2) / (2 + 4)
    user_7, tab_2 = (1 + 2) / (3 + 4), (2 + 2) / (4 + 4)
    expected = [
        _log_odds(item_2) + _log_odds(user_7) + _log_odds(tab_2) - 2 * _log_odds(prior),
        _log_odds(user_7),  # item 9 and tab 4 were never seen
        _log_odds(item_3) + _log_odds(tab_2) - _log_odds(prior),  # nor was user 8
    ]
    assert score_N == pytest.approx(expected, abs=1e-6)
    assert label_N.tolist() == [1, 0, 0] and user_N.tolist() == [7, 7, 8]
    assert day_N.tolist() == [1, 1, 1] and item_N.tolist() == [2, 9, 3]


def test_conditional_task_uses_rows_that_meet_the_condition(data_dir, monkeypatch):
    monkeypatch.setattr(rates, "PSEUDO_COUNTS", 4)
    manifest = schema.read_manifest(data_dir)
    fitted = rates.score_rates(data_dir, manifest, "test", "buy", keys=("user",))
    (score,), (label,), (user,), (day,), (item,) = fitted.arrays()[:5]
    prior = 2 / 3  # clicked candidates of train and valid: three, two bought
    assert score == pytest.approx(_log_odds((1 + 4 * prior) / (1 + 4)), abs=1e-6)
    assert (label, user, day, item) == (1, 7, 1, 2)


def test_context_column_is_repeated_for_each_candidate(data_dir):
    manifest = schema.read_manifest(data_dir)
    score_N, *_ = rates.score_rates(data_dir, manifest, "test", "click", keys=("context.hour",)).arrays()
    assert score_N[0] == score_N[1] != score_N[2]


def test_validation_is_scored_with_rates_of_train_only(data_dir):
    manifest = schema.read_manifest(data_dir)
    score_N, *_ = rates.score_rates(data_dir, manifest, "valid", "click", keys=("user",)).arrays()
    assert score_N == pytest.approx([_log_odds(2 / 4)] * 2)  # user 5 is new, and its own labels are not used


def test_several_splits_are_not_scored_with_their_own_labels(data_dir):
    manifest = schema.read_manifest(data_dir)
    valid_N, test_N, together_N = (
        rates.score_rates(data_dir, manifest, split, "click").arrays()[0] for split in ("valid", "test", "valid+test")
    )
    assert together_N[: len(valid_N)] == pytest.approx(valid_N)  # counted on train alone, although test is there too
    assert together_N[len(valid_N) :] != pytest.approx(test_N)  # which is counted on valid too
    for split in ("train+valid", "train+test"):
        with pytest.raises(ValueError, match="counted on itself"):
            rates.score_rates(data_dir, manifest, split, "click")


def test_popularity_of_train_leaves_its_positives_out_among_other_splits_too(data_dir):
    manifest = schema.read_manifest(data_dir)
    counts_N = np.expm1(rates.score_popularity(data_dir, manifest, "train+valid", "click").arrays()[0])
    assert counts_N == pytest.approx([2, 1, 2, 1, 1, 1], abs=1e-5)  # events of the histories alone


def test_popularity_counts_histories_and_positives_of_train(data_dir):
    manifest = schema.read_manifest(data_dir)
    predictions = rates.score_popularity(data_dir, manifest, "test", "click")
    assert np.expm1(predictions.arrays()[0]) == pytest.approx([4, 0, 1], abs=1e-5)
    assert predictions.kind == "score"


@pytest.mark.parametrize(("least", "auc", "rows"), [(1, 1.0, 2), (2, np.nan, 1), (3, np.nan, 0)])
def test_frequent_items_are_those_of_the_pretraining_histories(data_dir, least, auc, rows):
    keep = {}
    evaluate_baseline("popularity", data_dir, "test", ["click"], keep=keep)
    found = frequent_item_metrics(keep, data_dir, least)  # items 2, 9 and 3 of test have 2, 0 and 1 events
    expected = {f"auc_item_count@{least}": auc, f"rows_item_count@{least}": rows}
    assert found == {"click": pytest.approx(expected, nan_ok=True)}


def test_items_are_not_counted_without_pretraining_histories_or_items(data_dir):
    keep = {}
    evaluate_baseline("popularity", data_dir, "test", ["click"], keep=keep)
    manifest = schema.read_manifest(data_dir)
    unbounded = dataclasses.replace(manifest, unbounded={"item": "hashed"})
    splits = tuple(split for split in manifest.splits if split.name != "pretrain")
    for other, message in ((unbounded, "hashed ids"), (dataclasses.replace(manifest, splits=splits), "has only")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(schema, "read_manifest", lambda _, other=other: other)
            frequent_item_metrics(keep, data_dir, 5)
    with pytest.raises(ValueError, match="without items"):
        frequent_item_metrics({"click": Predictions()}, data_dir, 5)


def test_a_pretraining_split_without_rows_counts_no_event(data_dir):
    manifest, empty = schema.read_manifest(data_dir), {"files": (), "num_rows": 0, "num_history_tokens": 0}
    item = manifest.feature(manifest.item_feature)
    assert pretrain_counts(data_dir, manifest, item).any()
    none = tuple(dataclasses.replace(split, **empty) for split in manifest.splits if split.name == "pretrain")
    assert not pretrain_counts(data_dir, dataclasses.replace(manifest, splits=none), item).any()


def test_evaluate_returns_the_metrics_of_every_task(data_dir):
    result = evaluate_baseline("rates", data_dir, "test")
    assert list(result) == ["click", "buy"]
    assert result["click"]["rows"] == 3 and result["buy"]["rows"] == 1
    assert list(evaluate_baseline("popularity", data_dir, "test", ["buy"])) == ["buy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "train"}, "cannot be scored with rates counted on itself"),
        ({"task": "like"}, "no task 'like'"),
        ({"split": "holdout"}, "no split 'holdout'"),
        ({"keys": ("candidate.author",)}, r"has no columns \['candidate.author'\]"),
        ({"keys": ("candidate.tag",)}, "'candidate.tag' is a bag"),
    ],
)
def test_bad_requests_raise(data_dir, arguments, message):
    arguments = {"split": "test", "task": "click"} | arguments
    with pytest.raises(ValueError, match=message):
        rates.score_rates(data_dir, schema.read_manifest(data_dir), **arguments)


def test_rates_need_both_classes(data_dir):
    manifest = schema.read_manifest(data_dir)
    splits = (dataclasses.replace(manifest.split("valid"), name="train"), manifest.split("test"))
    splits += (dataclasses.replace(manifest.split("test"), name="valid"),)
    with pytest.raises(ValueError, match="1 positives of 1 rows"):
        rates.score_rates(data_dir, dataclasses.replace(manifest, splits=splits), "valid+test", "buy")


def test_unknown_baseline_raises(data_dir):
    with pytest.raises(ValueError, match="no baseline 'magic'"):
        evaluate_baseline("magic", data_dir, "test")


def test_truncated_file_is_named(data_dir):
    path = data_dir / "test" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"part-00000\.parquet is truncated"):
        evaluate_baseline("rates", data_dir, "test")


@pytest.mark.parametrize("name", ["rates", "popularity"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("candidate.item", [2**62], "holds .* 4611686018427387904, expected 1 .."),
        ("candidate.item", [-1], "holds -1 .. "),
        ("candidate.item", [None], "has 2 nulls"),
        ("candidate.item", None, "has 1 nulls where a list belongs"),
        ("label.click", [0.5], "a label that is not 0, 1 or null"),
        ("label.click", [float("nan")], "a label that is not 0, 1 or null"),
    ],
)
def test_values_that_break_the_contract_are_named(data_dir, name, column, value, message):
    """An index of 2^62 would ask numpy for as many counters."""
    path = data_dir / "test" / "part-00000.parquet"
    table = pq.read_table(path)
    index = table.column_names.index(column)
    values = table[column].to_pylist()
    values[0] = value if value is None else value * len(values[0])
    pq.write_table(table.set_column(index, column, pa.array(values, table.schema.field(index).type)), path)
    with pytest.raises(ValueError, match=message) as error:
        evaluate_baseline(name, data_dir, "test")
    assert str(path) in str(error.value) and column in str(error.value)


def test_a_table_that_no_memory_holds_is_refused(data_dir):
    manifest = schema.read_manifest(data_dir)
    tables = tuple(dataclasses.replace(table, num_rows=10**13) for table in manifest.tables)
    with pytest.raises(ValueError, match="has 10000000000000 rows, at most"):
        rates.score_popularity(data_dir, dataclasses.replace(manifest, tables=tables), "test", "click")


def test_a_data_set_without_tasks_has_nothing_to_score(data_dir):
    schema.write_manifest(dataclasses.replace(schema.read_manifest(data_dir), tasks=()), data_dir)
    with pytest.raises(ValueError, match="has no task, so there is nothing to score"):
        evaluate_baseline("next_item_popularity", data_dir, "test")
