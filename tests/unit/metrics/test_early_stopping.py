import math

import pytest

from gpsd_dist.metrics.early_stopping import EarlyStopping


@pytest.mark.parametrize(
    ("values", "best_step", "stale"),
    [
        ((0.5, 0.6, 0.6), 2, 1),
        ((math.nan,), 1, 1),
        ((math.nan, math.nan, math.nan), 3, 3),
        ((math.nan, 0.4, math.nan), 2, 1),
        ((0.5, math.nan, math.nan), 1, 2),
        ((math.nan, -math.inf), 2, 0),
    ],
)
def test_nan_is_no_progress(values, best_step, stale):
    stopping = EarlyStopping()
    for step, value in enumerate(values, start=1):
        stopping.update(value, step)
    assert (stopping.best_step, stopping.stale) == (best_step, stale)
    assert stopping.is_out_of_patience(stale) == (stale > 0)
