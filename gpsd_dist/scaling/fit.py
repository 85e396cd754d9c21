"""Fits power laws to the points of a ladder: AUC = c - a x^-b, log loss = c + a x^-b (arXiv:2506.03699, figure 5).

x is the number of dense parameters. The estimate is bounded least squares: for a given b the other two follow in closed
form, so b alone is searched. Intervals are those of the F test on the sum of squares S (profile likelihood): they hold
all parameters with S <= S_min (1 + t^2 / (n - 3)), t the 0.975 quantile of Student's t with n - 3 degrees of freedom.
Two usual ways were tried and left:
- a residual bootstrap: with 4 points it covered 0.77 - 0.78 instead of 0.95 (300 synthetic ladders from the paper's
  curve), because it knows no t quantile, and one degree of freedom needs 12.7 instead of 2;
- the covariance matrix: where noise is half the size of the effect it covered c in 0.78 of the cases, because b and c
  trade off along a curve that a symmetric interval does not follow, and it means nothing at a bound.
The intervals assume that points scatter independently around the curve; `lack_of_fit_p` tests that against the seeds.

Letters: n points, G values of the exponent b.
"""

import dataclasses
import math
import typing

import numpy as np
import scipy.optimize
import scipy.special

MIN_SIZES = 4  # distinct sizes that a fit needs: three parameters, and one degree of freedom to judge them by
CONFIDENCE = 0.95
B_BOUNDS = (1e-3, 3.0)
"""The paper's exponent is 0.24. Below, the curve is a logarithm; above, a step from the smallest size to the rest."""
_EXPONENTS_G = np.geomspace(*B_BOUNDS, 300)
_NO_EFFECT = 1e-6
_INSIDE = 200  # exponents inside the interval of b over which the other intervals are taken


@dataclasses.dataclass(frozen=True)
class Law:
    """Describes how a metric depends on size: y = c + sign * a * x^-b."""

    metric: str
    sign: int
    c_max: float  # the limit c is in [0, c_max]; the effect at the geometric mean of the sizes is in [0, c_max], too

    @property
    def formula(self) -> str:
        return f"{self.metric} = c {'+' if self.sign > 0 else '-'} a x^-b"


LAWS = {"auc": Law("auc", -1, 1.0), "log_loss": Law("log_loss", 1, 10.0)}


@dataclasses.dataclass(frozen=True)
class Fit:
    """Holds one fitted law. `effect` is a x^-b at `x0`, the geometric mean of the sizes: better scaled than a."""

    law: Law
    x_n: np.ndarray
    y_n: np.ndarray
    x0: float
    c: float
    effect: float
    b: float
    b_interval: tuple[float, float]
    slack: float  # how far the sum of squares may rise above its minimum inside the intervals

    @property
    def a(self) -> float:
        return self.effect * self.x0**self.b

    def predict(self, x) -> np.ndarray:
        return self.c + self.law.sign * self.effect * (np.asarray(x, float) / self.x0) ** -self.b

    def band(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Returns lower and upper ends of the interval of the curve (not of new points) at sizes x."""
        z = np.atleast_1d(np.asarray(x, float)) / self.x0
        ends = [self._interval(lambda b_G, z_=z_: (np.ones_like(b_G), self.law.sign * z_**-b_G)) for z_ in z]
        return tuple(np.clip(np.array(ends), 0.0, self.law.c_max).T)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % intervals of c, a and b, cut at their bounds."""
        c = self._interval(lambda b_G: (np.ones_like(b_G), np.zeros_like(b_G)))
        a = self._interval(lambda b_G: (np.zeros_like(b_G), self.x0**b_G))
        return {"c": (max(c[0], 0.0), min(c[1], self.law.c_max)), "a": (max(a[0], 0.0), a[1]), "b": self.b_interval}

    def _interval(self, direction: typing.Callable) -> tuple[float, float]:
        """Finds the range of m_c c + m_e effect inside the slack; `direction` maps b [G] to (m_c [G], m_e [G]).

        For a given b the model is linear in c and effect, so the range is that of an ellipse.
        """
        b_G = np.append(np.linspace(*self.b_interval, _INSIDE), self.b)
        line = _Lines(self.law, self.x_n / self.x0, self.y_n, b_G)
        m_c, m_e = direction(b_G)
        center = m_c * line.c_G + m_e * line.effect_G
        spread = m_c**2 / len(self.y_n) + (m_e - m_c * line.mean_G) ** 2 / line.variance_G
        floor = self._sum_of_squares() + self.slack
        reach = np.sqrt(np.maximum(floor - line.free_squares_G, 0.0) * spread)
        return float((center - reach).min()), float((center + reach).max())

    def _sum_of_squares(self) -> float:
        return float(((self.y_n - self.predict(self.x_n)) ** 2).sum())

    def r2(self) -> float:
        """Returns the part of the variance that the curve explains; NaN if all points are equal."""
        total = float(((self.y_n - self.y_n.mean()) ** 2).sum())
        return 1.0 - self._sum_of_squares() / total if total > 0 else math.nan

    def not_determined(self) -> list[str]:
        """Lists estimates and interval ends at a bound, which the points do not determine."""
        found = []
        if self.effect <= _NO_EFFECT * self.law.c_max:
            found.append("a = 0: the metric does not improve with size")
        intervals = self.intervals()
        for name, low, high in (("c", 0.0, self.law.c_max), ("b", B_BOUNDS[0] * 1.001, B_BOUNDS[1] * 0.999)):
            if intervals[name][0] <= low or intervals[name][1] >= high:
                found.append(f"{name} at its bound")
        return found

    def lack_of_fit_p(self) -> float:
        """Tests "sizes scatter around the curve no more than seeds do"; NaN without repeated or spare sizes.

        A small p value means that seeds agree better with each other than with the curve: intervals are too narrow.
        """
        sizes = np.unique(self.x_n)
        groups = [self.y_n[self.x_n == size] for size in sizes]
        pure = float(sum(((group - group.mean()) ** 2).sum() for group in groups))
        pure_freedom, freedom = len(self.y_n) - len(sizes), len(sizes) - 3
        if pure_freedom < 1 or freedom < 1 or pure <= 0:
            return math.nan
        ratio = max(self._sum_of_squares() - pure, 0.0) / freedom / (pure / pure_freedom)
        return float(scipy.special.fdtrc(freedom, pure_freedom, ratio))

    def as_dict(self) -> dict[str, typing.Any]:
        return {
            "formula": self.law.formula,
            "c": self.c,
            "a": self.a,
            "b": self.b,
            "interval_95": {name: list(ends) for name, ends in self.intervals().items()},
            "r2": self.r2(),
            "points": len(self.y_n),
            "sizes": len(np.unique(self.x_n)),
            "lack_of_fit_p": self.lack_of_fit_p(),
            "not_determined": self.not_determined(),
            "largest_left_out": leave_largest_out(self.law, self.x_n, self.y_n),
        }


class _Lines:
    """Solves least squares for each of many exponents b: then y = c + effect * (sign z^-b) is a line in sign z^-b."""

    def __init__(self, law: Law, z_n: np.ndarray, y_n: np.ndarray, b_G: np.ndarray):
        p_Gn = law.sign * z_n ** -b_G[:, None]
        self.mean_G = p_Gn.mean(1)
        self.variance_G = ((p_Gn - self.mean_G[:, None]) ** 2).sum(1)
        slope_G = ((p_Gn - self.mean_G[:, None]) * (y_n - y_n.mean())).sum(1) / self.variance_G
        self.effect_G, self.c_G = slope_G, y_n.mean() - slope_G * self.mean_G
        self.free_squares_G = ((y_n - self.c_G[:, None] - self.effect_G[:, None] * p_Gn) ** 2).sum(1)
        # Inside the bounds: the effect is cut first, then c; where c is cut, the effect is solved for again.
        self.bounded_effect_G = np.clip(self.effect_G, 0.0, law.c_max)
        self.bounded_c_G = np.clip(y_n.mean() - self.bounded_effect_G * self.mean_G, 0.0, law.c_max)
        through_G = ((y_n - self.bounded_c_G[:, None]) * p_Gn).sum(1) / (p_Gn**2).sum(1)
        is_cut_G = self.bounded_c_G != y_n.mean() - self.bounded_effect_G * self.mean_G
        self.bounded_effect_G = np.where(is_cut_G, np.clip(through_G, 0.0, law.c_max), self.bounded_effect_G)
        residual_Gn = y_n - self.bounded_c_G[:, None] - self.bounded_effect_G[:, None] * p_Gn
        self.bounded_squares_G = (residual_Gn**2).sum(1)


def fit_law(law: Law, x_n, y_n, min_sizes: int = MIN_SIZES) -> Fit | None:
    """Fits the best curve to points (x, y); None with fewer than `min_sizes` distinct sizes: no fit is possible.

    ValueError for a size that is not positive or a metric that is not finite.
    """
    x_n, y_n = np.asarray(x_n, float), np.asarray(y_n, float)
    if not ((x_n > 0) & np.isfinite(x_n) & np.isfinite(y_n)).all():
        raise ValueError(f"{law.metric}: sizes must be positive and metrics finite, got {list(zip(x_n, y_n))}")
    if len(np.unique(x_n)) < min_sizes:
        return None
    x0 = float(np.exp(np.log(x_n).mean()))
    c, effect, b = _estimate(law, x_n / x0, y_n)
    squares = float(((y_n - c - law.sign * effect * (x_n / x0) ** -b) ** 2).sum())
    freedom = len(y_n) - 3
    t = float(scipy.special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) if freedom > 0 else 0.0
    slack = squares * t**2 / max(freedom, 1) + 1e-12 * float(((y_n - y_n.mean()) ** 2).sum())
    return Fit(law, x_n, y_n, x0, c, effect, b, _b_interval(law, x_n / x0, y_n, b, squares + slack), slack)


def _estimate(law: Law, z_n: np.ndarray, y_n: np.ndarray) -> tuple[float, float, float]:
    """Finds (c, effect, b): the best exponent of a grid, refined between its neighbours; c and effect follow from b."""
    best = int(_Lines(law, z_n, y_n, _EXPONENTS_G).bounded_squares_G.argmin())
    bracket = _EXPONENTS_G[[max(best - 1, 0), min(best + 1, len(_EXPONENTS_G) - 1)]]
    found = scipy.optimize.minimize_scalar(
        lambda b: _Lines(law, z_n, y_n, np.array([b])).bounded_squares_G[0], bounds=bracket, options={"xatol": 1e-10}
    )
    b_G = np.array([found.x, _EXPONENTS_G[best]])  # a bounded search never tries the ends of its bracket
    line = _Lines(law, z_n, y_n, b_G)
    i = int(line.bounded_squares_G.argmin())
    return float(line.bounded_c_G[i]), float(line.bounded_effect_G[i]), float(b_G[i])


def _b_interval(law: Law, z_n: np.ndarray, y_n: np.ndarray, b: float, limit: float) -> tuple[float, float]:
    """Finds the outermost exponents whose best bounded curve has a sum of squares <= limit."""

    def excess(b_G) -> np.ndarray:
        return _Lines(law, z_n, y_n, np.atleast_1d(b_G)).bounded_squares_G - limit

    grid = np.sort(np.append(_EXPONENTS_G, b))
    is_in = excess(grid) <= 0
    is_in[np.searchsorted(grid, b)] = True
    first, last = int(is_in.argmax()), len(grid) - 1 - int(is_in[::-1].argmax())
    ends = []
    for at, beyond in ((first, first - 1), (last, last + 1)):
        if not 0 <= beyond < len(grid):
            ends.append(float(grid[at]))
        elif excess(grid[at])[0] > 0:  # rounding error at the estimate itself
            ends.append(b)
        else:
            ends.append(scipy.optimize.brentq(lambda value: excess(value)[0], grid[at], grid[beyond], xtol=1e-6))
    return min(ends), max(ends)


def leave_largest_out(law: Law, x_n: np.ndarray, y_n: np.ndarray) -> dict[str, float] | None:
    """Predicts the largest size from the smaller ones; the error is measured mean - prediction.

    None with fewer than three smaller sizes. With three, the curve passes through their means: no degree of freedom is
    left, but the error still counts.
    """
    x_n, y_n = np.asarray(x_n, float), np.asarray(y_n, float)
    is_largest = x_n == x_n.max()
    smaller = fit_law(law, x_n[~is_largest], y_n[~is_largest], min_sizes=3)
    if smaller is None:
        return None
    predicted, measured = float(smaller.predict(x_n.max())), float(y_n[is_largest].mean())
    return {
        "dense_parameters": float(x_n.max()),
        "predicted": predicted,
        "measured": measured,
        "error": measured - predicted,
        "sizes_fitted": len(np.unique(x_n[~is_largest])),
    }
