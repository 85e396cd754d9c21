"""Exact classification metrics: degenerate inputs, bad inputs, and independence of the order of rows."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from gpsd_dist.metrics import binary_metrics, classification


def _rows(num_rows=400, num_users=17, levels=9, seed=0):
    """Rows with many ties: score float32, label uint8, user_hash int64 (also negative)."""
    rng = np.random.default_rng(seed)
    score_N = (rng.integers(-levels, levels, num_rows) / 4).astype(np.float32)
    label_N = (rng.random(num_rows) < 1 / (1 + np.exp(-score_N))).astype(np.uint8)
    return score_N, label_N, rng.choice(rng.integers(-(2**62), 2**62, num_users), num_rows)


def test_result_has_exactly_the_documented_keys():
    assert tuple(classification.classification_metrics(*_rows())) == binary_metrics.METRIC_KEYS


def test_order_of_rows_changes_no_bit():
    score_N, label_N, user_N = _rows(5000)
    score_N = score_N + np.random.default_rng(1).normal(size=5000).astype(np.float32)
    day_N = np.random.default_rng(2).integers(-1, 4, 5000)
    expected = classification.classification_metrics(score_N, label_N, user_N, day_N=day_N)
    assert expected["gauc_user_day"] != expected["gauc"]
    for seed in range(3):
        order_N = np.random.default_rng(seed).permutation(5000)
        shuffled = (column[order_N] for column in (score_N, label_N, user_N))
        assert classification.classification_metrics(*shuffled, day_N=day_N[order_N]) == expected


@hypothesis.given(strategies.lists(strategies.tuples(strategies.floats(-9, 9, width=32), strategies.booleans())))
@hypothesis.settings(max_examples=200, deadline=None)
def test_auc_is_the_share_of_won_pairs(rows):
    score_N = np.array([score for score, _ in rows], np.float32)
    label_N = np.array([label for _, label in rows], np.uint8)
    result = classification.classification_metrics(score_N, label_N, np.zeros(len(rows), np.int64))
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in score_N[label_N == 1] for n in score_N[label_N == 0]]
    if wins:
        assert result["auc"] == pytest.approx(np.mean(wins), abs=1e-12)
        assert result["gauc"] == pytest.approx(result["auc"], rel=1e-15) and result["gauc_users"] == 1
    else:
        assert np.isnan(result["auc"]) and np.isnan(result["gauc"]) and np.isnan(result["ne"])
        assert result["gauc_users"] == 0
    assert result["rows"] == len(rows)


def test_no_rows_give_nan_and_zero_rows():
    result = classification.Predictions().metrics()
    assert result["rows"] == 0 and result["gauc_users"] == 0
    assert all(np.isnan(result[key]) for key in ("auc", "gauc", "log_loss", "ne", "calibration", "label_rate"))


def test_one_class_keeps_log_loss_and_has_no_auc():
    result = classification.classification_metrics(np.float32([1, -1]), np.uint8([0, 0]), np.int64([1, 1]))
    assert np.isfinite(result["log_loss"]) and result["label_rate"] == 0
    assert all(np.isnan(result[key]) for key in ("auc", "gauc", "ne", "calibration"))


def test_log_loss_of_extreme_logits_is_finite_and_exact():
    result = classification.classification_metrics(np.float32([80, -80, 80]), np.uint8([1, 0, 0]), np.int64([1, 1, 1]))
    assert result["log_loss"] == pytest.approx(80 / 3, rel=1e-15)


def test_constant_base_rate_has_ne_and_calibration_one():
    label_N = np.uint8([1] * 30 + [0] * 70)
    result = classification.classification_metrics(np.full(100, np.log(0.3 / 0.7)), label_N, np.arange(100))
    assert result["ne"] == pytest.approx(1, abs=1e-7) and result["calibration"] == pytest.approx(1, abs=1e-7)
    assert result["auc"] == 0.5


def test_plain_score_has_auc_but_no_calibration():
    result = classification.classification_metrics(*_rows(), kind="score")
    assert result["auc"] == classification.classification_metrics(*_rows())["auc"]
    assert all(np.isnan(result[key]) for key in ("log_loss", "ne", "calibration"))


def test_gauc_user_day_compares_rows_of_one_user_and_day_only():
    day_s = classification.SECONDS_PER_DAY
    # User 1: the score orders every day rightly, but gives the second day, with fewer positives, the higher scores.
    score_N, label_N = np.float32([1, 2, 8, 9, 7, 5, 5]), np.uint8([0, 1, 0, 1, 0, 1, 0])
    user_N = np.int64([1, 1, 1, 1, 1, 2, 2])
    time_s_N = np.int64([0, day_s - 1, day_s, 2 * day_s - 1, day_s, 0, 0])
    made = classification.Predictions()
    made.add(score_N, label_N, user_N, time_s_N=time_s_N)
    result = made.metrics()
    assert result["gauc"] == pytest.approx((5 * 4 / 6 + 2 * 0.5) / 7) and result["gauc_users"] == 2
    assert result["gauc_user_day"] == pytest.approx((2 * 1 + 3 * 1 + 2 * 0.5) / 7) and result["gauc_user_days"] == 3


@pytest.mark.parametrize("time_s", [None, -1, -(10**9), 5], ids=str)
def test_without_times_the_rows_of_a_user_are_of_one_day(time_s):
    made = classification.Predictions()
    made.add(*_rows(), time_s_N=None if time_s is None else np.full(400, time_s))
    result = made.metrics()
    assert (result["gauc_user_day"], result["gauc_user_days"]) == (result["gauc"], result["gauc_users"])


def test_unknown_times_are_a_day_of_their_own():
    made = classification.Predictions()
    made.add(np.float32([3, 1, 2]), np.uint8([1, 0, 1]), np.int64([7, 7, 7]), time_s_N=np.int64([0, -1, -9]))
    result = made.metrics()
    assert result["gauc_user_day"] == 1 and result["gauc_user_days"] == 1  # the rows without a time


def test_negative_zero_ties_with_zero():
    result = classification.classification_metrics(np.float32([-0.0, 0.0]), np.uint8([1, 0]), np.int64([1, 1]))
    assert result["auc"] == 0.5


def test_predictions_take_tensors_and_leave_out_unobserved_rows():
    score_N, label_N, user_N = _rows()
    parts = classification.Predictions()
    for start in range(0, 400, 130):
        end = slice(start, start + 130)
        label = torch.from_numpy(label_N[end]).float()
        is_observed = torch.ones(len(label) + 1, dtype=torch.bool)
        is_observed[-1] = False
        parts.add(
            torch.cat([torch.from_numpy(score_N[end]), torch.tensor([float("nan")])]).requires_grad_(),
            torch.cat([label, torch.tensor([float("nan")])]),
            torch.cat([torch.from_numpy(user_N[end]), torch.tensor([5])]),
            is_observed,
        )
    assert len(parts) == 400
    assert parts.metrics() == classification.classification_metrics(score_N, label_N, user_N)


def test_predictions_keep_a_copy():
    score_N = np.float32([1, 2])
    predictions = classification.Predictions()
    predictions.add(score_N, np.uint8([0, 1]), np.int64([1, 1]))
    score_N[:] = 0
    assert predictions.arrays()[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("kind", "score", "label", "message"),
    [
        ("logit", [0.0, float("nan")], [0, 1], "1 of 2 scores .logit. are not finite"),
        ("logit", [0.0, 1.0], [0, 2], "1 of 2 labels are not 0 or 1"),
        ("logit", [0.0, 1.0], [0.0, float("nan")], "1 of 2 labels are not 0 or 1"),
        ("logit", [0.0], [0, 1], "one length"),
    ],
)
def test_bad_rows_raise(kind, score, label, message):
    with pytest.raises(ValueError, match=message):
        classification.Predictions(kind).add(np.float32(score), np.array(label), np.zeros(len(label), np.int64))


def test_unknown_kind_raises():
    with pytest.raises(ValueError, match="not one of"):
        classification.Predictions("odds")
