import hashlib

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from data_pipeline import command_line, synthesize, synthetic_log
from data_pipeline.sources import synthetic

SMALL = {"num_users": 3_000, "num_items": 2_000, "num_topics": 12, "niches_per_topic": 8, "requests_per_day": 1_500}


@pytest.fixture(scope="module")
def made():
    config = synthetic_log.SyntheticConfig(**SMALL)
    return config, synthetic_log.synthesize(config)


def _numbers(column) -> np.ndarray:
    return np.array([int(value[1:]) for value in column.to_pylist()])


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthesize.write(
            synthetic_log.SyntheticConfig(num_users=300, num_items=1_600, requests_per_day=50, seed=seed),
            tmp_path / name,
        )
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(synthesize.FILE_NAMES)
        digests.append(
            [hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for file in synthesize.FILE_NAMES[:4]]
        )
    assert digests[0] == digests[1]
    assert all(one != other for one, other in zip(digests[0], digests[2]))


def test_blocks_of_users_make_one_log():
    """Users and requests are numbered through, all blocks have the same items, and the sizes are those asked."""
    config = synthetic_log.SyntheticConfig(num_users=500, num_items=1_600, requests_per_day=100)
    logs = list(synthetic_log.blocks(config, users_per_block=150))
    assert [log.users.num_rows for log in logs] == [150, 150, 150, 50]
    users = np.concatenate([_numbers(log.users["user"]) for log in logs])
    assert (users == np.arange(500)).all()
    requests = np.concatenate([_numbers(log.exposures["request"]) for log in logs])
    assert (requests == np.repeat(np.arange(7 * 100), 4)).all()
    assert all(log.items.equals(logs[0].items) for log in logs)
    for number, log in enumerate(logs):
        for table in (log.behaviours, log.exposures):
            assert (_numbers(table["user"]) // 150 == number).all()
            assert (np.diff(table["time_s"].to_numpy()) >= 0).all()
    per_user = sum(log.behaviours.num_rows for log in logs) / 500
    assert per_user == pytest.approx(config.events_per_user, rel=0.25)
    assert not logs[1].behaviours["item"].slice(0, 99).equals(logs[0].behaviours["item"].slice(0, 99))


def test_popularity_of_the_behaviour_log_is_zipf_like(made):
    config, _ = made
    shares = np.sort(synthetic_log._draw_items(config, np.random.default_rng(0)).popularity)[::-1]
    slope = np.polyfit(np.log(np.arange(1, 2_001)), np.log(shares), 1)[0]
    assert slope == pytest.approx(-config.zipf_exponent, abs=1e-6)
    counts = np.sort(np.bincount(_numbers(made[1].behaviours["item"]), minlength=2_000))[::-1]
    assert counts[:200].sum() > 0.35 * counts.sum()  # a tenth of the items: 0.1 if popularity were uniform
    assert counts[-1_000:].sum() < 0.35 * counts.sum()


def test_clicks_are_rare_purchases_rarer_and_only_after_a_click(made):
    _, log = made
    click, buy = log.exposures["click"].to_numpy(), log.exposures["buy"].to_numpy()
    assert 0.1 < click.mean() < 0.35
    assert 0.1 < buy[click == 1].mean() < click.mean() + 0.1
    assert buy[click == 0].max() == 0


def test_the_ceiling_leaves_room_above_the_floor(made):
    config, log = made
    about = synthesize.describe(config, [synthesize.Truth.of(log)], log.behaviours.num_rows)
    for split in ("train", "valid", "test"):
        assert 0.80 <= about["splits"][split]["oracle_click_auc"] <= 0.86
    assert _smoothed_rate_auc(config, log) < 0.70


def _smoothed_rate_auc(config, log) -> float:
    """Click AUC on test of the train click rates of item, user, tab and slot, with 20 pseudo-counts."""
    time_s, click = log.exposures["time_s"].to_numpy(), log.exposures["click"].to_numpy()
    train, test = time_s < config.boundaries_s[1], time_s >= config.boundaries_s[2]
    score = np.zeros(len(click))
    for column in ("item", "user", "tab", "slot"):
        _, key = np.unique(log.exposures[column].to_numpy(zero_copy_only=False), return_inverse=True)
        shown, clicked = (
            np.bincount(key[train], minlength=key.max() + 1),
            np.bincount(key[train], click[train], key.max() + 1),
        )
        rate = (clicked + 20 * click[train].mean()) / (shown + 20)
        score += np.log(rate / (1 - rate))[key]
    return synthesize.area_under_curve(score[test], click[test])


def test_co_occurrence_in_the_behaviour_log_predicts_clicks(made):
    config, log = made
    user, item = _numbers(log.behaviours["user"]), _numbers(log.behaviours["item"])
    seen = np.zeros((config.num_users, config.num_items), np.float32)
    early = log.behaviours["time_s"].to_numpy() < config.boundaries_s[1]
    seen[user[early], item[early]] = 1
    together = seen.T @ seen
    np.fill_diagonal(together, 0)
    lift = together * together.sum() / np.maximum(np.outer(together.sum(0), together.sum(0)), 1e-9)
    vectors = np.log(np.maximum(lift, 1))  # positive pointwise mutual information
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    score = seen @ (vectors @ vectors.T) / np.maximum(seen.sum(1, keepdims=True), 1)  # [users, items]
    test = log.exposures["time_s"].to_numpy() >= config.boundaries_s[2]
    shown = score[_numbers(log.exposures["user"])[test], _numbers(log.exposures["item"])[test]]
    auc = synthesize.area_under_curve(shown, log.exposures["click"].to_numpy()[test])
    assert auc > _smoothed_rate_auc(config, log) + 0.03


def test_interests_drift():
    config = synthetic_log.SyntheticConfig(**SMALL)
    niche_share = np.full(config.num_niches, 1 / config.num_niches)
    interest = synthetic_log._draw_users(config, niche_share, np.random.default_rng(0)).interest
    changed = (interest[:, 1:] != interest[:, :-1]).mean()
    assert changed == pytest.approx(config.drift_per_week, abs=0.02)  # a sibling drawn may be the niche itself


def test_truth_is_not_in_the_log_and_times_lie_inside(made):
    config, log = made
    for table in (log.behaviours, log.exposures, log.items, log.users):
        assert not any("probab" in name or "niche" in name or "interest" in name for name in table.column_names)
    for table, first_s in ((log.behaviours, synthetic_log.START_TIME_S), (log.exposures, config.boundaries_s[0])):
        times = table["time_s"].to_numpy()
        assert times.min() >= first_s
        assert times.max() < config.boundaries_s[-1]


def test_command_line_writes_the_asked_sizes(tmp_path, capsys):
    synthesize.main(
        ["--out_dir", str(tmp_path), "--num_users", "100", "--num_items", "1600", "--requests_per_day", "20"]
    )
    assert '"exposures"' in capsys.readouterr().out
    assert pq.read_metadata(tmp_path / "users.parquet").num_rows == 100
    assert pq.read_metadata(tmp_path / "exposures.parquet").num_rows == 7 * 20 * 4


def test_csv_files_hold_the_rows_of_the_parquet_files(tmp_path):
    config = synthetic_log.SyntheticConfig(num_users=100, num_items=1_600, requests_per_day=20)
    for name in synthesize.FORMATS:
        synthesize.write(config, tmp_path / name, name)
    toml = (tmp_path / "csv" / "schema.toml").read_text()
    assert toml.replace(".csv", ".parquet") == (tmp_path / "parquet" / "schema.toml").read_text() != toml
    for name in ("behaviours", "exposures", "items", "users"):
        rows = pq.read_table(tmp_path / "parquet" / f"{name}.parquet")
        read = pyarrow.csv.read_csv(tmp_path / "csv" / f"{name}.csv")
        assert read.cast(rows.schema).equals(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_users": 0}, "num_users"),
        ({"drift_per_week": 2.0}, "drift_per_week"),
        ({"num_items": 100}, "per niche"),
        ({"num_items": 1e4}, "whole"),
    ],
)
def test_wrong_sizes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        synthetic_log.SyntheticConfig(**options)


def test_area_under_curve_counts_ties_half():
    assert synthesize.area_under_curve(np.array([0.1, 0.5, 0.5, 0.9]), np.array([0, 0, 1, 1])) == 0.875
    assert synthesize.area_under_curve(np.array([0.1]), np.array([1])) is None


def test_the_schema_fits_the_files_and_the_command_line_goes_first(prepare, tmp_path):
    synthesize.write(
        synthetic_log.SyntheticConfig(num_users=200, num_items=1_600, requests_per_day=30), tmp_path / "raw"
    )
    data = prepare("synthetic", "--min_count", "2")
    manifest = data.manifest
    assert [task.name for task in manifest.tasks] == ["click", "buy"]
    assert manifest.tasks[1].given == "click"
    assert manifest.max_history_length == synthetic_log.SyntheticConfig().max_history_length
    assert manifest.options["min_count"] == 2
    num = {name: manifest.split(name).num_candidates for name in ("train", "valid", "test")}
    assert num == {"train": 600, "valid": 120, "test": 120}
    log = pq.read_table(tmp_path / "raw" / "exposures.parquet").to_pylist()
    clicks = sum(sum(row["label.click"]) for split in ("train", "valid", "test") for row in data.rows(split).values())
    assert clicks == sum(row["click"] for row in log)


def test_an_empty_folder_is_filled(tmp_path, monkeypatch):
    small = synthetic_log.SyntheticConfig(num_users=100, num_items=1_600, requests_per_day=10)
    monkeypatch.setattr(synthetic_log, "SyntheticConfig", lambda seed: small)
    options = command_line.parse(
        ["--source", "synthetic", "--raw_dir", str(tmp_path / "raw"), "--out_dir", str(tmp_path / "out")]
    )
    options = synthetic.complete(options)
    files = synthetic.find_files(options)
    assert sorted(path.name for path in files.values()) == sorted(set(synthesize.FILE_NAMES) - {"about.json"})
    assert options.max_history_length == small.max_history_length
    assert type(options.max_history_length) is int  # it goes into the manifest
