"""Logs that a TOML file describes, from CSV to metrics: sampled negatives, and events with an order but no time."""

import math
import pathlib

import numpy as np
import pytest

from data_pipeline import build, write
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.trained_run import evaluate_checkpoint
from gpsd_dist.trainer import Trainer
from tests.assets.cases import logs
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import cpu_runtime, tiny_run

RATES = {"feed": 0.1, "search": 0.5}
SCHEMA = """
[exposure]
files = "shown.csv"
user = "user"
item = "item"
time = "ts"
extends_history = "click"
task = [{ column = "click" }]
feature = [{ column = "page", place = "candidate" }]
negative_sampling_rate = "rate"
"""
pytestmark = pytest.mark.timeout(300)


def sampled_log(folder: pathlib.Path, num_shown: int = 60_000) -> pathlib.Path:
    """Draws clicks by item and page, 2 to 30 % of the exposures, and keeps negatives at the rate of their page."""
    draw = np.random.default_rng(3)
    item, user = draw.integers(20, size=num_shown), draw.integers(800, size=num_shown)
    page = draw.choice(list(RATES), num_shown)
    logit = -3.5 + 0.1 * item + 0.7 * (page == "search")
    click = (draw.random(num_shown) < 1 / (1 + np.exp(-logit))).astype(int)
    rate = np.array([RATES[name] for name in page])
    kept = (click == 1) | (draw.random(num_shown) < rate)
    ts = 1_700_000_000 + 7 * np.arange(num_shown)
    columns = zip(*(values[kept] for values in (user, item, ts, click, page, rate)))
    rows = [",".join(str(value) for value in row) for row in columns]
    folder.mkdir()
    (folder / "shown.csv").write_text("\n".join(["user,item,ts,click,page,rate", *rows]) + "\n")
    (folder / "schema.toml").write_text(SCHEMA)
    return folder


def _train_and_score(rank: int, world_size: int, runs) -> tuple[dict, list[np.ndarray]]:
    """For `run_distributed`: metrics of the last run on test, and the columns of its scores."""
    runtime, keep = cpu_runtime(rank, world_size), {}
    for run in runs:
        Trainer(run, runtime).train()
    metrics = evaluate_checkpoint(run.output_dir, None, "test", runtime, keep=keep)
    rows: Predictions = keep["click"]
    return metrics["click"], [np.array(column) for column in rows.arrays()]


def test_probabilities_are_those_of_the_whole_log(tmp_path):
    arguments = [
        "--source",
        "generic",
        "--raw_dir",
        str(sampled_log(tmp_path / "raw")),
        "--out_dir",
        str(tmp_path / "d"),
    ]
    assert build.main(arguments) == 0
    run = tiny_run(
        "finetune",
        tmp_path / "d",
        tmp_path / "run",
        data={"global_batch_rows": 128, "eval_batch_rows_per_rank": 512},
        train={"epochs": 2, "log_interval_steps": 20},
    )
    [(metrics, (score, label, *_, weight))] = run_distributed(_train_and_score, 1, tmp_path, [run], timeout_s=200)
    probability = 1 / (1 + np.exp(-score.astype(float)))
    assert set(weight[label == 1]) == {1.0} and {round(float(w)) for w in weight[label == 0]} == {2, 10}
    # A kept row stands for `weight` rows; their number is known, the labels of a row and what was kept are drawn.
    error = math.sqrt(((label - weight * probability) ** 2).sum()) / label.sum()
    assert metrics["calibration"] == pytest.approx((weight * probability).sum() / label.sum(), rel=1e-6)
    assert error < 0.06 and abs(metrics["calibration"] - 1) < 2 * error
    assert 0.05 < metrics["label_rate"] < 0.2 < label.mean()


def priced_log(folder: pathlib.Path, num_shown: int = 20_000) -> pathlib.Path:
    """Draws clicks by a lognormal price, 80 % below its median and 20 % above; one price is 1e9."""
    draw = np.random.default_rng(3)
    price = np.exp(draw.normal(size=num_shown)).round(4)
    click = (draw.random(num_shown) < np.where(price < 1, 0.8, 0.2)).astype(int)
    price[100] = 1e9
    columns = (draw.integers(500, size=num_shown), draw.integers(50, size=num_shown), range(num_shown), click, price)
    rows = [f"{user},{item},{1_700_000_000 + 7 * n},{label},{value}" for user, item, n, label, value in zip(*columns)]
    folder.mkdir()
    (folder / "shown.csv").write_text("\n".join(["user,item,ts,click,price", *rows]) + "\n")
    feature = '{ column = "price", place = "candidate", kind = "numerical" }'
    text = SCHEMA.replace('{ column = "page", place = "candidate" }', feature)
    (folder / "schema.toml").write_text(text.replace('negative_sampling_rate = "rate"\n', ""))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("fence", "low", "high"), [(3.0, 0.77, 0.81), (1e12, 0.45, 0.55)])
def test_a_far_number_does_not_make_all_others_alike(tmp_path, monkeypatch, fence, low, high):
    """The AUC of 0.80 is possible. A fence of 1e12 is none: what every data set had before."""
    monkeypatch.setattr(write, "FENCE", fence)
    raw = priced_log(tmp_path / "raw")
    assert build.main(["--source", "generic", "--raw_dir", str(raw), "--out_dir", str(tmp_path / "d")]) == 0
    options = {"data": {"global_batch_rows": 128, "eval_batch_rows_per_rank": 512}, "train": {"epochs": 3}}
    run = tiny_run("finetune", tmp_path / "d", tmp_path / "run", **options)
    [(metrics, _)] = run_distributed(_train_and_score, 1, tmp_path, [run], timeout_s=250)
    print(f"fence {fence}: AUC {metrics['auc']:.4f}, log loss {metrics['log_loss']:.4f}")
    assert low < metrics["auc"] < high


@pytest.mark.parametrize("has_time", [True, False])
def test_logs_without_times_are_pretrained_finetuned_and_scored(tmp_path, has_time):
    raw = logs.order_only(tmp_path / "raw", has_time)
    path = raw / "schema.toml"
    path.write_text(path.read_text().replace("no_valid = true\n", ""))
    assert build.main(["--source", "generic", "--raw_dir", str(raw), "--out_dir", str(tmp_path / "d")]) == 0
    options = {"pretrain": {"auxiliary": ()}, "train": {"epochs": 1}}
    runs = [tiny_run("pretrain", tmp_path / "d", tmp_path / "pretrain", **options)]
    start = tmp_path / "pretrain"
    runs.append(tiny_run("finetune", tmp_path / "d", tmp_path / "run", "ST_SF", init_checkpoint=start, **options))
    [(metrics, (score, *_))] = run_distributed(_train_and_score, 1, tmp_path, runs, timeout_s=200)
    assert metrics["rows"] == len(score) == 2 * logs.NUM_USERS and 0 <= metrics["auc"] <= 1
