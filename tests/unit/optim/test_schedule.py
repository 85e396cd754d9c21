import itertools
import math

import pytest

from gpsd_dist.optim.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),  # never 0: the first step is not wasted
        (4, 0.5),
        (9, 1.0),  # last step of the warm-up
        (10, 1.0),  # first of the cosine
        (60, 0.2 + 0.8 * 0.5),  # half way down
        (85, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.75))),
        (110, 0.2),
        (111, 0.2),
        (10_000, 0.2),
    ],
)
def test_values(step, expected):
    assert learning_rate_factor(step, 110, 10, 0.2) == pytest.approx(expected, rel=1e-12)


def test_without_warmup_it_starts_at_the_peak():
    assert learning_rate_factor(0, 10, 0, 0.1) == 1.0


def test_rises_then_falls():
    factors = [learning_rate_factor(step, 50, 7, 0.1) for step in range(60)]
    assert all(a < b for a, b in itertools.pairwise(factors[:7]))
    assert all(a > b for a, b in itertools.pairwise(factors[7:51]))


@pytest.mark.parametrize("total", [0, 1, 5])
def test_a_warmup_as_long_as_the_run_divides_by_nothing(total):
    assert [learning_rate_factor(step, total, total, 0.1) for step in (total, total + 1)] == [1.0, 0.1]


def test_a_final_fraction_of_one_keeps_the_rate_to_the_bit():
    assert {learning_rate_factor(step, 50, 0, 1.0) for step in range(60)} == {1.0}
