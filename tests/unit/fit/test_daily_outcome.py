"""What is said about days: means of days, GAUC by day, ages on the same days, one sentence."""

import json
import math
import pathlib

import numpy as np
import pytest

from gpsd_dist.fit import daily_outcome
from gpsd_dist.fit.daily_outcome import SCRATCH, WARM, Scores, make
from gpsd_dist.fit.days import Days
from gpsd_dist.metrics.auc_interval import auc_by_user
from gpsd_dist.metrics.classification import classification_metrics
from tests.helpers.synthetic import make_manifest

FIRST, TREES = 19_000, "boosted trees"


def rows(days, *, skill: float, seed: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Labels are the same for every model; scores know `skill` of them."""
    parts = []
    for day in days:
        truth, noise = np.random.default_rng(day), np.random.default_rng((seed, day))
        label_N = (truth.random(400) < 0.4).astype(np.uint8)
        score_N = (skill * (2.0 * label_N - 1) + noise.normal(size=400) + shift).astype(np.float32)
        day_N = np.full(400, day, np.int32)
        parts.append({"label": label_N, "score": score_N, "user_hash": truth.integers(40, size=400), "day": day_N})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def of(label: str, day: int, *, skill: float, cpu_s: float | None = None, seed: int = 0, shift: float = 0.0, last: int):
    return Scores(label, day, {"click": rows(range(day + 1, last + 1), skill=skill, seed=seed, shift=shift)}, cpu_s)


def three_days() -> Days:
    models = tuple(range(FIRST, FIRST + 3))
    return Days(make_manifest(), pathlib.Path("unused"), models, tuple(day + 1 for day in models))


def scores_of(days: Days) -> list[Scores]:
    found = []
    for day in days.models:
        found.append(of(SCRATCH, day, skill=0.6, cpu_s=40.0, seed=1, last=days.scored[-1]))
        if day > FIRST:
            found.append(of(WARM, day, skill=1.5, cpu_s=10.0, seed=2, last=days.scored[-1]))
        found.append(of(TREES, day, skill=0.3, seed=3, last=days.scored[-1]))
    return found


@pytest.fixture
def days():
    return three_days()


@pytest.fixture
def scores(days):
    return scores_of(days)


def test_means_are_over_days_that_all_models_have(scores, days):
    made = make(scores, days, ("click",), [])
    whole = {line["label"]: line for line in made.record["lines"]["click"] if line["of"] == "all days"}
    assert [whole[name]["days"] for name in (SCRATCH, WARM, TREES)] == [2, 2, 2]  # the first day has no warm start
    parts = [one.columns["click"] for one in scores if one.label == WARM]
    next_days = [{k: v[p["day"] == p["day"].min()] for k, v in p.items()} for p in parts]
    aucs = [auc_by_user(p["score"], p["label"], p["user_hash"]) for p in next_days]
    assert whole[WARM]["auc"] == pytest.approx(np.mean([auc.auc for auc in aucs]))
    pooled = {k: np.concatenate([p[k] for p in next_days]) for k in next_days[0]}
    expected = classification_metrics(pooled["score"], pooled["label"], pooled["user_hash"], "logit", pooled["day"])
    for name in ("gauc", "gauc_user_day", "log_loss", "calibration"):
        assert whole[WARM][name] == expected[name]
    assert whole[WARM]["cpu_s"] == 10 and whole[TREES]["cpu_s"] is None


def test_an_interval_of_a_mean_adds_up_what_a_user_moves_on_all_days():
    """Twice the same day is no new information: the interval must not shrink."""
    day = rows([FIRST], skill=1.0, seed=0)
    one = auc_by_user(day["score"], day["label"], day["user_hash"])
    assert daily_outcome._mean([one, one]).half_width == pytest.approx(one.half_width)
    others = auc_by_user(day["score"], day["label"], day["user_hash"] + 1000)
    assert daily_outcome._mean([one, others]).half_width == pytest.approx(one.half_width / math.sqrt(2), rel=0.02)


def test_the_verdict_compares_quality_and_time(scores, days):
    sentence = make(scores, days, ("click",), []).verdict
    assert sentence.startswith("Over 2 days: going on with yesterday's model is better than training from scratch")
    assert "for 25% of its CPU time; warm start is above boosted trees (+" in sentence


def test_a_warm_start_that_is_alike_or_worse_is_called_so(scores, days):
    alike = [one._replace(columns=two.columns) for one, two in zip(scores, scores) if one.label != WARM]
    same = [one._replace(label=WARM, cpu_s=20.0) for one in alike if one.label == SCRATCH and one.day > FIRST]
    sentence = make([*alike, *same], days, ("click",), []).verdict
    assert "is not clearly better or worse than training from scratch" in sentence
    swapped = {SCRATCH: WARM, WARM: SCRATCH, TREES: TREES}
    worse = [one._replace(label=swapped[one.label]) for one in scores if one.day > FIRST]
    assert "is worse than training from scratch" in make(worse, days, ("click",), []).verdict


def test_ages_are_compared_on_the_same_days(days):
    """A model that is older knows less; days differ much in how hard they are, which must not show."""
    found = []
    for day in days.models:
        parts = []
        for scored in range(day + 1, days.scored[-1] + 1):
            age, ease = scored - day, 0.2 * (scored % 2)
            parts.append(rows([scored], skill=1.5 - 0.4 * age + ease, seed=day, shift=age - 1.0))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        found.append(Scores(SCRATCH, day, {"click": columns}, 1.0))
    lines = [line for line in make(found, days, ("click",), []).record["lines"]["click"] if line["of"] == "age"]
    assert [(line["age_days"], line["days"]) for line in lines] == [(1, 3), (2, 2), (3, 1)]
    assert lines[0]["auc_lost"] == 0 and 0.03 < lines[1]["auc_lost"] < lines[2]["auc_lost"]
    assert lines[0]["calibration"] < lines[1]["calibration"] < lines[2]["calibration"]


def test_a_day_of_one_class_has_no_auc_and_is_said(scores, days):
    for one in scores:
        rows_N = one.columns["click"]
        rows_N["label"] = np.where(rows_N["day"] == FIRST + 2, 1, rows_N["label"]).astype(np.uint8)
    made = make(scores, days, ("click",), [])
    assert made.notes == ["2022-01-10 has click labels of one class alone: it has no AUC, and no mean counts it"]
    day = next(line for line in made.record["lines"]["click"] if line.get("day") == "2022-01-10")
    assert math.isnan(day["auc"]) and day["log_loss"] > 0
    assert "going on with yesterday's model is better" in made.verdict


def test_what_is_not_known_is_left_out_and_not_nan(scores, days, tmp_path, capsys):
    """Rows of one user, trainings that no clock saw, and a last day of one class."""
    for one in scores:
        one.columns["click"]["user_hash"][:] = 7
        one.columns["click"]["label"][one.columns["click"]["day"] == days.scored[-1]] = 0
    made = make([one._replace(cpu_s=None) for one in scores], days, ("click",), [])
    daily_outcome.show(made, tmp_path)
    assert "rows are of one user" in " ".join(made.notes) and "warm start is not clearly above" in made.verdict
    shown = capsys.readouterr().out
    assert "nan" not in shown.lower()


def test_nothing_scored_says_what_to_do(days):
    made = make([], days, ("click",), ["pretraining"])
    assert made.verdict == "No day was scored: give a larger --budget_minutes, the same command goes on."
    assert made.notes == ["--budget_minutes ended before pretraining: the same command goes on with it"]


def test_table_and_file_hold_the_same(scores, days, tmp_path, capsys):
    made = make(scores, days, ("click",), [])
    daily_outcome.show(made, tmp_path)
    shown = capsys.readouterr().out
    saved = json.loads((tmp_path / "daily.json").read_text())
    assert saved["verdict"] == made.verdict and made.verdict in shown
    line = next(one for one in saved["lines"]["click"] if one["of"] == "all days" and one["label"] == WARM)
    assert f"{line['auc']:.4f} +- {line['auc_half_width']:.4f}" in shown
    assert "2022-01-10 warm start" in shown and "warm start, 2 days old" in shown
