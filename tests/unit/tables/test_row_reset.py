import numpy as np

from gpsd_dist.tables.row_reset import initial_rows


def test_values_are_standard_normal_and_uncorrelated():
    values = initial_rows(0, "item", 5, np.arange(2, 20_002), 16).astype(np.float64)
    assert values.shape == (20_000, 16)
    # 5 standard errors of the mean, the variance, the fourth moment and the correlations of 320,000 normal numbers
    num = values.size
    assert abs(values.mean()) < 5 / np.sqrt(num)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / num)
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96 / num)
    correlation = np.corrcoef(values.T) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(values))


def test_a_row_is_the_same_whoever_computes_it_and_differs_by_turn_table_and_seed():
    rows = np.array([3, 90, 7])
    whole = initial_rows(1, "item", 4, rows, 8)
    assert np.array_equal(whole[1:2], initial_rows(1, "item", 4, rows[1:2], 8))
    assert np.array_equal(whole[:, :4], initial_rows(1, "item", 4, rows, 4))
    for other in (
        initial_rows(2, "item", 4, rows, 8),
        initial_rows(1, "user", 4, rows, 8),
        initial_rows(1, "item", 5, rows, 8),
    ):
        assert not np.isin(whole, other).any()
