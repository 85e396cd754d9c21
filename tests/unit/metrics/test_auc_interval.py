"""Intervals of AUCs: against formulas written out, resampled users, and data drawn many times."""

import math

import numpy as np
import pytest

from gpsd_dist.metrics.auc_interval import Z_95, auc_by_user, half_width_of_counts
from gpsd_dist.metrics.binary_metrics import classification_metrics


def _draw(random, num_users, rows_per_user, spread, shift=1.0):
    """Users with a level of their own, so that their rows are alike; scores with ties."""
    user_N = np.repeat(np.arange(num_users), rows_per_user)
    label_N = random.integers(0, 2, len(user_N))
    score_N = label_N * shift + random.normal(size=len(user_N)) + spread * random.normal(size=num_users)[user_N]
    return np.round(score_N, 1), label_N, user_N * 7919 % 10_007


def test_auc_is_the_exact_one_and_influences_cancel():
    rows = _draw(np.random.default_rng(0), 50, 4, 1.0)
    made = auc_by_user(*rows)
    assert made.auc == pytest.approx(classification_metrics(*rows, "score")["auc"], abs=1e-12)
    assert made.influence_U.sum() == pytest.approx(0, abs=1e-12) and len(made.user_hash_U) == 50


def test_independent_rows_give_delongs_variance():
    """Written out pair by pair: DeLong et al., Biometrics 44 (1988), 837-845, but for its n - 1 per class."""
    score_N, label_N, user_N = _draw(np.random.default_rng(1), 120, 1, 0.0)
    wins_PN = (score_N[label_N == 1][:, None] > score_N[label_N == 0]) + 0.5 * (
        score_N[label_N == 1][:, None] == score_N[label_N == 0]
    )
    positives, negatives = wins_PN.shape
    variance = wins_PN.mean(1).var() / positives + wins_PN.mean(0).var() / negatives
    assert auc_by_user(score_N, label_N, user_N).half_width == pytest.approx(
        Z_95 * math.sqrt(variance * 120 / 119), rel=1e-12
    )


def test_resampled_users_spread_as_much():
    random = np.random.default_rng(2)
    score_N, label_N, user_N = _draw(random, 200, 5, 2.0)
    made = auc_by_user(score_N, label_N, user_N)
    rows_of = [np.flatnonzero(user_N == user) for user in made.user_hash_U]
    drawn = []
    for _ in range(400):
        rows_N = np.concatenate([rows_of[user] for user in random.integers(0, 200, 200)])
        drawn.append(classification_metrics(score_N[rows_N], label_N[rows_N], user_N[rows_N], "score")["auc"])
    assert made.half_width == pytest.approx(Z_95 * np.std(drawn), rel=0.12)  # 400 draws: 3.5 % standard error


def test_difference_covers_the_true_one_at_the_stated_rate():
    """Both models see the same level of a user: the difference is known better than either AUC."""
    random, hits, narrower = np.random.default_rng(3), 0, 0
    for _ in range(300):
        score_N, label_N, user_N = _draw(random, 150, 4, 1.0)
        other_N = score_N + random.normal(size=len(score_N))
        twin_N = score_N + random.normal(size=len(score_N))  # as good as the other one: true difference 0
        one, two = (auc_by_user(s, label_N, user_N) for s in (other_N, twin_N))
        difference, half_width = one.minus(two)
        hits += abs(difference) <= half_width
        narrower += half_width < math.hypot(one.half_width, two.half_width)
    assert 0.92 <= hits / 300 <= 0.98 and narrower == 300  # binomial: 0.95 +- 0.025


def test_what_cannot_be_computed():
    with pytest.raises(ValueError, match="needs both classes, there are 2 positives and 0 negatives"):
        auc_by_user([0.1, 0.2], [1, 1], [1, 2])
    with pytest.raises(ValueError, match="other users"):
        auc_by_user([0.1, 0.2], [1, 0], [1, 2]).minus(auc_by_user([0.1, 0.2], [1, 0], [1, 3]))
    assert math.isnan(auc_by_user([0.1, 0.2], [1, 0], [1, 1]).half_width)
    assert math.isnan(half_width_of_counts(0.5, 0, 9)) and math.isnan(half_width_of_counts(math.nan, 5, 9))


def test_width_from_counts():
    """An AUC of 0.5 on 100 + 100 rows: the variance of the Mann-Whitney U statistic, (P + N + 1) / (12 P N)."""
    assert half_width_of_counts(0.5, 100, 100) == pytest.approx(Z_95 * math.sqrt(201 / 120_000), rel=1e-9)
    random = np.random.default_rng(4)
    score_N, label_N, user_N = _draw(random, 2000, 1, 0.0)
    counted = half_width_of_counts(auc_by_user(score_N, label_N, user_N).auc, label_N.sum(), 2000 - label_N.sum())
    assert counted == pytest.approx(auc_by_user(score_N, label_N, user_N).half_width, rel=0.05)
