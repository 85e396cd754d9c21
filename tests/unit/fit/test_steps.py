"""How a budget is shared, and what happens to a floor that cannot be computed."""

import math
import sys

import pytest

from gpsd_dist.fit import steps
from gpsd_dist.fit.data_check import look
from gpsd_dist.fit.display import Display
from tests.helpers.synthetic import write_dataset


@pytest.fixture
def clock(monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(steps.time, "monotonic", lambda: now_s[0])
    return now_s


def test_a_budget_is_shared_by_weight_and_what_is_left_over_flows_on(clock):
    budget = steps.Budget(10)
    steps.plan_budget(budget, 1, 2, 1)
    short = 10 * steps.SCORING_S  # 7 floors, 3 scorings
    assert budget.deadline_s() == pytest.approx(1000 + (600 - short) * 2 / 5)
    clock[0] += 60  # took less
    assert budget.deadline_s() == pytest.approx(1060 + (540 - short) / 3)
    clock[0] += 300
    least = steps.MIN_STARTS * 20  # 105 s for two trainings, each of which takes 20 s to start: one gets enough
    assert budget.deadline_s(start_up_s=20) == pytest.approx(1360 + least)
    clock[0] += least
    assert budget.deadline_s(start_up_s=20) is None and not budget.weights_left


def test_without_a_budget_there_is_no_deadline():
    budget = steps.Budget(None)
    steps.plan_budget(budget, 1, 0, 0)
    assert budget.deadline_s() == math.inf


def test_trees_without_lightgbm_are_left_out_and_said(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path / "data", seed=0, num_rows=60)
    facts = look(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "lightgbm", None)  # makes the import fail
    display = Display(6, tmp_path / "logs")
    runner = steps.Runner(tmp_path / "data", tmp_path, facts, display, steps.Budget(None))
    assert runner.floor("gbdt", "valid") == {} and not list(tmp_path.glob("floors/gbdt/*"))
    assert "pip install lightgbm" in capsys.readouterr().err
    assert set(runner.floor("rates", "valid")) == {"click", "buy"}
    assert [title for title, _ in runner.commands] == ["boosted trees on valid", "smoothed rates on valid"]
