"""Classification metrics against scikit-learn, and the same bits on 1, 2 and 3 ranks."""

import numpy as np
import pytest
import sklearn.metrics

from gpsd_dist.metrics import breakdown, classification
from tests.helpers import distributed


def _rows(num_rows=3000, num_users=200, seed=0):
    rng = np.random.default_rng(seed)
    score_N = np.round(rng.normal(size=num_rows), 1).astype(np.float32)  # about 80 levels: many ties
    label_N = (rng.random(num_rows) < 1 / (1 + np.exp(-score_N))).astype(np.uint8)
    user_N = rng.zipf(1.5, num_rows) % num_users - num_users // 2  # some users with one row, some with hundreds
    return score_N, label_N, user_N.astype(np.int64)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_scikit_learn(seed):
    score_N, label_N, user_N = _rows(seed=seed)
    result = classification.classification_metrics(score_N, label_N, user_N, day_N=_days())
    probability_N = 1 / (1 + np.exp(-score_N.astype(np.float64)))
    assert result["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(label_N, score_N), abs=1e-13)
    log_loss = sklearn.metrics.log_loss(label_N, probability_N)
    rate = label_N.mean()
    assert result["log_loss"] == pytest.approx(log_loss, rel=1e-13)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert result["ne"] == pytest.approx(log_loss / entropy, rel=1e-13)
    assert result["calibration"] == pytest.approx(probability_N.sum() / label_N.sum(), rel=1e-13)
    assert result["rows"] == 3000 and result["label_rate"] == rate

    for keys_N, mean, count in (
        (user_N, "gauc", "gauc_users"),
        (user_N * 4 + _days(), "gauc_user_day", "gauc_user_days"),
    ):
        weighted, weights = [], []
        for key in np.unique(keys_N):
            is_in_N = keys_N == key
            if len(set(label_N[is_in_N])) == 2:
                weights.append(is_in_N.sum())
                weighted.append(weights[-1] * sklearn.metrics.roc_auc_score(label_N[is_in_N], score_N[is_in_N]))
        assert result[mean] == pytest.approx(sum(weighted) / sum(weights), abs=1e-13)
        assert result[count] == len(weights)


def _days():
    return np.random.default_rng(9).integers(18_000, 18_004, 3000)


def _rank_metrics(rank, world_size):
    """Uneven shares: rank 0 has a third, the last rank nothing, whoever is between the rest."""
    bounds = {1: [0, 3000], 2: [0, 1000, 3000], 3: [0, 1000, 3000, 3000]}[world_size]
    classification._MESSAGE_ROWS = 700  # several messages per column
    predictions = {}
    for task, seed in (("click", 0), ("long_view", 1)):
        share = slice(bounds[rank], bounds[rank + 1])
        predictions[task] = classification.Predictions(with_items=task == "click")
        columns = (column[share] for column in _rows(seed=seed))
        time_s_N = _days()[share] * classification.SECONDS_PER_DAY + 17
        history_N = np.arange(3000)[share] % 70
        predictions[task].add(*columns, time_s_N=time_s_N, item_N=np.arange(3000)[share], history_N=history_N)
    if rank % 2:  # a rank that met the tasks in another order must not mix them up
        predictions = dict(reversed(predictions.items()))
    keep = {}
    metrics = classification.gather_metrics(predictions, keep)
    assert {task: rows.metrics() for task, rows in keep.items()} == (metrics if rank == 0 else {})
    assert rank != 0 or sorted(keep["click"].items()) == list(range(3000))
    return metrics, {task: breakdown.breakdown(rows.scored()) for task, rows in sorted(keep.items())}


def test_breakdown_of_several_ranks_has_the_bits_of_one(tmp_path):
    (_, expected), *_ = distributed.run_distributed(_rank_metrics, 1, tmp_path)
    assert set(expected["click"]["groups"]) == {"history", "item", "day"}
    for world_size in (2, 3):
        (_, made), *others = distributed.run_distributed(_rank_metrics, world_size, tmp_path)
        assert made == expected and all(other == {} for _, other in others)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_single_rank_metrics_bit_for_bit(world_size, tmp_path):
    expected = {
        task: classification.classification_metrics(*_rows(seed=seed), day_N=_days())
        for task, seed in (("click", 0), ("long_view", 1))
    }
    for result, _ in distributed.run_distributed(_rank_metrics, world_size, tmp_path):
        assert result == expected


def _rank_zero_fails(rank, world_size):
    if rank == 0:
        classification.classification_metrics = lambda *args, **kwargs: 1 / 0
    try:
        classification.gather_metrics({"click": classification.Predictions()})
    except RuntimeError as error:
        return type(error).__name__, str(error)


def test_failure_on_rank_zero_reaches_all_ranks(tmp_path):
    assert (
        distributed.run_distributed(_rank_zero_fails, 2, tmp_path)
        == [("FailedOnMain", "ZeroDivisionError: division by zero")] * 2
    )
