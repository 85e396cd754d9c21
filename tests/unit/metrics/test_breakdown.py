"""Intervals, calibration and groups of scores: against formulas, leave-one-out, and rows in another order."""

import dataclasses
import json
import math

import numpy as np
import pytest

from gpsd_dist.metrics import breakdown
from gpsd_dist.metrics.auc_interval import Z_95, auc_by_user
from gpsd_dist.metrics.binary_metrics import classification_metrics
from gpsd_dist.metrics.breakdown import ScoredRows


def _rows(num_rows=2000, num_users=150, seed=0, **changes):
    rng = np.random.default_rng(seed)
    score_N = np.round(rng.normal(-1, 1, num_rows), 2).astype(np.float32)
    label_N = (rng.random(num_rows) < 1 / (1 + np.exp(-score_N))).astype(np.uint8)
    user_N = rng.integers(0, num_users, num_rows) - 70
    day_N = rng.integers(19_000, 19_004, num_rows).astype(np.int32)
    item_N, history_N = rng.integers(1, 9, num_rows), rng.integers(0, 60, num_rows).astype(np.int32)
    return dataclasses.replace(ScoredRows("logit", score_N, label_N, user_N, day_N, item_N, history_N), **changes)


def _made(rows) -> dict:
    return json.loads(json.dumps(breakdown.breakdown(rows)))


def _leave_one_out(rows, metric: str) -> float:
    """Half width by the jackknife over users."""
    values = []
    for user in np.unique(rows.user_hash_N):
        part = rows.select(rows.user_hash_N != user)
        found = classification_metrics(part.score_N, part.label_N, part.user_hash_N, day_N=part.day_N)
        values.append(found[metric])
    return Z_95 * math.sqrt((len(values) - 1) * np.var(values))


@pytest.mark.parametrize("metric", ["auc", "gauc", "gauc_user_day", "log_loss", "calibration"])
def test_half_widths_are_those_of_the_jackknife(metric):
    rows = _rows()
    assert _made(rows)["half_width"][metric] == pytest.approx(_leave_one_out(rows, metric), rel=0.03)


def test_order_of_rows_changes_no_bit():
    rows = _rows(seed=1)
    expected = _made(rows)
    for seed in range(2):
        assert _made(rows.select(np.random.default_rng(seed).permutation(2000))) == expected


def test_weights_count_rows_as_often_as_repeating_them():
    rows, repeats_N = _rows(seed=2), np.random.default_rng(5).integers(1, 4, 2000)
    weighted, repeated = (
        _made(dataclasses.replace(rows, weight_N=repeats_N.astype(np.float32))),
        _made(rows.select(np.repeat(np.arange(2000), repeats_N))),
    )
    assert weighted["half_width"] == pytest.approx(repeated["half_width"], rel=1e-9)
    assert weighted["half_width"] != pytest.approx(_made(rows)["half_width"], rel=1e-3)
    for name, groups in weighted["groups"].items():
        for one, other in zip(groups, repeated["groups"][name], strict=True):
            assert [one[k] for k in ("auc", "log_loss")] == pytest.approx([other[k] for k in ("auc", "log_loss")])


def test_groups_hold_every_row_once_and_have_the_metrics_of_their_rows():
    rows = _rows(item_N=np.arange(2000) % 10)  # 0 and 1 are reserved rows
    groups = _made(rows)["groups"]
    names = {what: [group["name"] for group in found] for what, found in groups.items()}
    assert names["history"] == ["0", "1-2", "3-5", "6-10", "11-20", "21-50", "51-100"]
    assert names["item"] == ["known", "new"]
    assert names["day"] == ["2022-01-08", "2022-01-09", "2022-01-10", "2022-01-11"]
    assert all(sum(group["rows"] for group in found) == 2000 for found in groups.values())
    part = rows.select((rows.history_N >= 3) & (rows.history_N <= 5))
    expected = auc_by_user(part.score_N, part.label_N, part.user_hash_N)
    (group,) = [group for group in groups["history"] if group["name"] == "3-5"]
    assert (group["rows"], group["positives"]) == (len(part.score_N), part.label_N.sum())
    assert [group["auc"], group["auc_half_width"]] == pytest.approx([expected.auc, expected.half_width])
    metrics = classification_metrics(part.score_N, part.label_N, part.user_hash_N)
    assert [group[name] for name in ("log_loss", "calibration")] == pytest.approx(
        [metrics[name] for name in ("log_loss", "calibration")]
    )


def test_a_long_split_has_spans_of_days():
    groups = _made(_rows(day_N=(19_000 + np.arange(2000) % 100).astype(np.int32)))["groups"]["day"]
    assert len(groups) == 25 and groups[0]["name"] == "2022-01-08 to 2022-01-11"
    assert sum(group["rows"] for group in groups) == 2000


def test_what_is_not_known_of_all_rows_is_left_out():
    day_N = np.where(np.arange(2000) < 1, -1, 19_000).astype(np.int32)
    made = _made(_rows(day_N=day_N, item_N=None, history_N=np.full(2000, -1, np.int32)))
    assert made["groups"] == {} and made["calibration"]


def test_bins_of_true_probabilities_are_calibrated():
    bins = _made(_rows(200_000))["calibration"]
    assert sum(one["rows"] for one in bins) == 200_000 and 12 <= len(bins) <= breakdown.CALIBRATION_BINS
    assert [one["predicted"] for one in bins] == sorted(one["predicted"] for one in bins)
    for one in bins:
        deviation = math.sqrt(one["predicted"] * (1 - one["predicted"]) / one["rows"])
        assert abs(one["predicted"] - one["observed"]) < 5 * deviation
    assert len(_made(_rows(score_N=np.zeros(2000, np.float32)))["calibration"]) == 1  # equal scores share a bin


def test_a_score_is_no_probability():
    made = _made(_rows(kind="score"))
    assert made["calibration"] == [] and set(made["half_width"]) == {"auc", "gauc", "gauc_user_day"}
    assert all(math.isnan(group["log_loss"]) for group in made["groups"]["day"])


@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_one_class_or_no_row_gives_nan(num_rows):
    rows = _rows(40).select(np.arange(num_rows))
    made = _made(dataclasses.replace(rows, label_N=np.zeros(num_rows, np.uint8)))
    assert all(math.isnan(made["half_width"][name]) for name in ("auc", "gauc"))
    assert sum(group["rows"] for group in made["groups"].get("day", [])) == num_rows
