"""The planted laws: frozen, learnable from the log, and without a trace of the probabilities in it."""

import csv
import hashlib

import numpy as np
import pytest

from benchmarks.laws import dataset, generators
from gpsd_dist import schema
from gpsd_dist.metrics.binary_metrics import classification_metrics

LAWS = tuple(generators.LAWS)
# Of 200 users, 10 candidates, seed 0. A law is frozen: where one of these differs, make another law of the change.
DIGESTS = {
    "item_bias": "b8f16168c8be",
    "item_attribute": "c9e460d62056",
    "match_category": "3f1d74ac75f0",
    "match_item": "1e6379dfc9de",
    "recency": "40085825a4f6",
    "order": "4d774bdebc56",
    "count": "bd7fdac6aa90",
    "user_item": "fb04c79030c1",
    "threshold": "7fffba6a7daa",
    "interval": "676bfd76fd7f",
    "time_of_day": "be6b36d81241",
    "new_item": "a84e1e4a64ed",
    "conversion": "3465abdc9694",
    "rare_feature": "46a011cae253",
}


def digest(law):
    log, users = generators.draw(law, 200, 10, seed=0)
    parts = [log.history_UH, log.shown_UK, log.explicit_UK, users.time_s_U]
    for group in (
        log.probabilities,
        log.item_features,
        log.user_features,
        log.context_features,
        log.candidate_features,
    ):
        parts += group.values()
    parts += generators.draw_labels(log, users).values()
    # Rounded, because exp may differ in the last bit between processors.
    text = "".join(str(np.round(part, 6).ravel().tolist()) for part in parts)
    return hashlib.md5(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_frozen(law):
    assert digest(law) == DIGESTS[law]


@pytest.mark.parametrize("law", LAWS)
def test_another_seed_is_another_log(law):
    logs = [generators.draw(law, 50, 10, seed)[0] for seed in (0, 0, 1)]
    assert np.array_equal(logs[0].shown_UK, logs[1].shown_UK)
    assert not np.array_equal(logs[0].shown_UK, logs[2].shown_UK)


@pytest.mark.parametrize("law", LAWS)
def test_its_explicit_feature_reaches_the_ceiling_and_others_do_not(law):
    log, users = generators.draw(law, 4000, 10, seed=1)
    *given, label_UK = generators.draw_labels(log, users).values()
    *_, probability_UK = log.probabilities.values()
    is_used_UK = given[0] == 1 if given else np.ones_like(label_UK, bool)
    is_train_UK = is_used_UK & ~users.is_after_train_U[:, None]
    is_test_UK = is_used_UK & users.is_after_train_U[:, None]

    def auc(score_UK):
        label_N = label_UK[is_test_UK].astype(np.uint8)
        return classification_metrics(score_UK[is_test_UK], label_N, np.zeros(len(label_N), int), "score")["auc"]

    def share_of_rates(class_UK):
        rows_C = np.bincount(class_UK[is_train_UK], minlength=class_UK.max() + 1)
        rate_C = (np.bincount(class_UK[is_train_UK], label_UK[is_train_UK], class_UK.max() + 1) + 0.4) / (rows_C + 2)
        return dataset.share(auc(rate_C[class_UK]), auc(probability_UK))

    assert 0.75 < auc(probability_UK) < 0.9
    assert share_of_rates(log.explicit_UK) > (0.85 if law == "new_item" else 0.95)  # 300 classes of 60 rows are noisy
    shuffled_UK = users.random.permutation(log.explicit_UK.ravel()).reshape(log.explicit_UK.shape)
    assert abs(share_of_rates(shuffled_UK)) < 0.06  # standard error of the AUC: 0.004, of the share: 0.012
    place_UK = np.broadcast_to(np.arange(10), label_UK.shape)
    assert abs(share_of_rates(place_UK)) < 0.06


@pytest.mark.parametrize("law", ["conversion", "rare_feature", "user_item"])
def test_the_built_data_hold_the_log_and_no_probability(law, tmp_path):
    made = dataset.prepare(law, tmp_path, num_users=300)
    log, _ = generators.draw(law, 300, 10, seed=0)
    known = [dataset.truth(made, split) for split in ("train", "valid", "test")]  # compares all labels
    assert sum(len(part.label_N) for part in known) == (300 * 10 if law != "conversion" else _num_clicks(made))
    features = {**log.item_features, **log.user_features, **log.context_features, **log.candidate_features}
    assert {f.name for f in schema.read_manifest(made.data_dir).features} == {"item", *features}
    read = {path.name for path in made.raw_dir.iterdir()}
    assert read <= {"history.csv", "shown.csv", "items.csv", "users.csv", "schema.toml"}
    for path in made.raw_dir.glob("*.csv"):
        header = next(csv.reader(path.open()))
        assert set(header) <= {"user", "item", "ts", *log.probabilities, *features}
    numbers = [value for value in features.values() if value.dtype.kind == "f"]
    for probability_UK in log.probabilities.values():
        assert all(value.shape != probability_UK.shape or not _agree(value, probability_UK) for value in numbers)


def _num_clicks(made):
    with np.load(made.aside) as aside:
        return aside["label.click"].sum()


def _agree(left, right):
    return abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) > 0.1


def test_a_folder_of_another_size_is_refused(tmp_path):
    dataset.prepare("interval", tmp_path, num_users=100)
    with pytest.raises(ValueError, match=r"\[100, 10, 0\].*\[200, 10, 0\]; choose another folder"):
        dataset.prepare("interval", tmp_path, num_users=200)
    with pytest.raises(ValueError, match="there is no law 'no_law'"):
        dataset.prepare("no_law", tmp_path)


def test_labels_of_other_data_are_noticed(tmp_path):
    made = dataset.prepare("interval", tmp_path, num_users=100)
    with np.load(made.aside) as aside:
        parts = dict(aside)
    np.savez(made.aside, **parts | {"label.click": 1 - parts["label.click"]})
    with pytest.raises(ValueError, match="labels of 'test' are not those that were drawn"):
        dataset.truth(made, "test")
