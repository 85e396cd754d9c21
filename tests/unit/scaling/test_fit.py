import math

import numpy as np
import pytest

from gpsd_dist.scaling.fit import B_BOUNDS, LAWS, fit_law, leave_largest_out

AUC, LOG_LOSS = LAWS["auc"], LAWS["log_loss"]
PAPER = {"c": 0.7097, "a": 0.7553, "b": 0.2364}  # arXiv:2506.03699, figure 5
PAPER_SIZES = (13e3, 53e3, 213e3, 850e3, 3.4e6, 40e6, 302e6)


def points(sizes, num_seeds: int, noise: float, *, law=AUC, truth=PAPER, seed: int = 0):
    """(x, y) of a synthetic ladder."""
    x = np.repeat(np.array(sizes, float), num_seeds)
    y = truth["c"] + law.sign * truth["a"] * x ** -truth["b"]
    return x, y + noise * np.random.default_rng(seed).standard_normal(len(x))


@pytest.mark.parametrize("law", [AUC, LOG_LOSS], ids=lambda law: law.metric)
@pytest.mark.parametrize("truth", [PAPER, {"c": 0.5, "a": 3.0, "b": 0.5}, {"c": 0.4, "a": 0.5, "b": 0.08}])
def test_points_on_a_curve_give_the_curve(law, truth):
    x, y = points(PAPER_SIZES, 1, 0.0, law=law, truth=truth)
    fit = fit_law(law, x, y)
    assert (fit.c, fit.a, fit.b) == pytest.approx((truth["c"], truth["a"], truth["b"]), rel=1e-3)
    assert fit.r2() == pytest.approx(1) and fit.predict(x) == pytest.approx(y, abs=1e-7)
    for name, (low, high) in fit.intervals().items():
        assert low <= truth[name] * (1 + 1e-3) and high >= truth[name] * (1 - 1e-3)
        assert high - low < 0.01 * truth[name]
    assert leave_largest_out(law, x, y)["error"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("law", [AUC, LOG_LOSS], ids=lambda law: law.metric)
def test_noisy_points_give_intervals_that_hold_the_truth(law):
    x, y = points(PAPER_SIZES, 3, 0.001, law=law)
    fit = fit_law(law, x, y)
    for name, (low, high) in fit.intervals().items():
        assert low < PAPER[name] < high, name
        assert low < getattr(fit, name) < high, name
    assert fit.intervals()["b"][1] - fit.intervals()["b"][0] < 0.06 and fit.r2() > 0.99
    assert fit.not_determined() == []


def coverage(sizes, num_seeds: int, noise: float, repeats: int) -> dict[str, float]:
    """Part of synthetic ladders whose intervals hold the truth; "curve": the band at the largest size."""
    hits = dict.fromkeys((*PAPER, "curve"), 0)
    truth = PAPER["c"] - PAPER["a"] * sizes[-1] ** -PAPER["b"]
    for seed in range(repeats):
        fit = fit_law(AUC, *points(sizes, num_seeds, noise, seed=seed))
        for name, (low, high) in fit.intervals().items():
            hits[name] += low <= PAPER[name] <= high
        (low,), (high,) = fit.band(sizes[-1])
        hits["curve"] += low <= truth <= high
    return {name: count / repeats for name, count in hits.items()}


def test_intervals_have_about_the_nominal_coverage():
    covered = coverage(PAPER_SIZES[:5], 2, 0.002, repeats=60)
    assert all(0.88 <= part <= 1.0 for part in covered.values()), covered  # 0.95 - 2.5 standard errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "num_seeds", "noise"),
    [
        (PAPER_SIZES, 3, 0.001),
        (PAPER_SIZES[:4], 1, 0.001),  # one degree of freedom
        (PAPER_SIZES[:5], 3, 0.006),  # noise of a third of the whole effect
        ((2e4, 3e4, 6e4, 2e5), 3, 0.008),  # hardly determined: many estimates are at a bound
    ],
)
def test_coverage_is_nominal_in_hard_cases(sizes, num_seeds, noise):
    covered = coverage(sizes, num_seeds, noise, repeats=400)
    assert all(0.91 <= part <= 0.995 for part in covered.values()), covered


def test_too_few_sizes_give_no_fit_however_many_seeds():
    x, y = points(PAPER_SIZES[:3], 5, 0.001)
    assert fit_law(AUC, x, y) is None
    assert fit_law(AUC, [], []) is None
    assert fit_law(AUC, *points(PAPER_SIZES[:4], 1, 0.001)) is not None


def test_four_single_points_know_little():
    """One degree of freedom: t is 12.7, and a bootstrap of residuals would promise an interval six times shorter."""
    fit = fit_law(AUC, *points(PAPER_SIZES[:4], 1, 0.001))
    low, high = fit.intervals()["b"]
    assert high - low > 0.3
    assert math.isnan(fit.lack_of_fit_p())


def test_metric_that_does_not_improve_is_said_to_be_flat():
    x = np.array(PAPER_SIZES)
    fit = fit_law(AUC, x, 0.8 - 0.01 * np.log10(x))
    assert fit.a == pytest.approx(0, abs=1e-6) and fit.r2() == pytest.approx(0, abs=1e-6)
    assert fit.not_determined()[0].startswith("a = 0")


def test_straight_line_in_log_size_leaves_limit_and_exponent_open():
    x = np.array(PAPER_SIZES)
    noise = 1e-3 * np.random.default_rng(0).standard_normal(len(x))
    fit = fit_law(AUC, x, 0.5 + 0.02 * np.log10(x) + noise)
    assert fit.intervals()["c"][1] == 1.0
    assert any(what.startswith("c at its bound") for what in fit.not_determined())


def test_estimates_stay_inside_their_bounds():
    for seed in range(20):
        fit = fit_law(AUC, *points(PAPER_SIZES[:4], 1, 0.05, seed=seed))
        assert 0 <= fit.c <= 1 and fit.a >= 0 and B_BOUNDS[0] <= fit.b <= B_BOUNDS[1]
        low, high = fit.band(PAPER_SIZES)
        assert (low >= 0).all() and (high <= 1).all() and (low <= high).all()


def test_band_holds_the_curve_and_widens_outside_the_points():
    x, y = points(PAPER_SIZES[:5], 2, 0.002)
    fit = fit_law(AUC, x, y)
    at = np.array([*PAPER_SIZES[:5], 302e6])
    low, high = fit.band(at)
    assert (low <= fit.predict(at)).all() and (fit.predict(at) <= high).all()
    assert high[-1] - low[-1] > 2 * (high[2] - low[2])


def test_largest_size_left_out_is_not_seen_by_the_prediction():
    x, y = points(PAPER_SIZES, 2, 0.0)
    y[-2:] += 0.01
    found = leave_largest_out(AUC, x, y)
    assert found["error"] == pytest.approx(0.01, abs=2e-4)
    assert found["measured"] == pytest.approx(y[-2:].mean()) and found["sizes_fitted"] == 6
    assert leave_largest_out(AUC, *points(PAPER_SIZES[:3], 2, 0.0)) is None
    four = leave_largest_out(AUC, *points(PAPER_SIZES[:4], 2, 0.0))
    assert four["sizes_fitted"] == 3 and four["error"] == pytest.approx(0, abs=1e-4)


def test_lack_of_fit_is_found_and_not_invented():
    x, y = points(PAPER_SIZES, 3, 0.001)
    assert fit_law(AUC, x, y).lack_of_fit_p() > 0.05
    shifted = y + 0.01 * (-1) ** np.searchsorted(PAPER_SIZES, x)  # every other rung is off the curve
    assert fit_law(AUC, x, shifted).lack_of_fit_p() < 1e-3


def test_order_of_points_does_not_matter():
    x, y = points(PAPER_SIZES, 2, 0.002)
    order = np.random.default_rng(0).permutation(len(x))
    one, other = fit_law(AUC, x, y), fit_law(AUC, x[order], y[order])
    assert (one.c, one.a, one.b) == pytest.approx((other.c, other.a, other.b), rel=1e-4)


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3, 0], [0.5] * 4), ([1, 2, 3, 4], [0.5, 0.5, 0.5, math.nan])])
def test_points_that_are_none_are_refused(x, y):
    with pytest.raises(ValueError, match="sizes must be positive and metrics finite"):
        fit_law(AUC, x, y)


def test_json_holds_everything_that_is_printed():
    values = fit_law(AUC, *points(PAPER_SIZES, 2, 0.002)).as_dict()
    assert values["formula"] == "auc = c - a x^-b" and values["points"] == 14 and values["sizes"] == 7
    assert set(values["interval_95"]) == {"a", "b", "c"} and values["largest_left_out"]["sizes_fitted"] == 6
