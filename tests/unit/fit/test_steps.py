"""How a budget is shared, and what happens to a floor that cannot be computed."""

import contextlib
import logging
import math
import sys

import pytest
import torch

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


def test_short_steps_are_reckoned_with_what_they_took(clock):
    """A minute is too short while each is reckoned with 15 s; the budget that would do is named."""
    assert steps.Budget(1).least_minutes == 0
    slow, quick = steps.Budget(1), steps.Budget(1)
    for budget, took_s in ((slow, 0), (quick, 4)):
        steps.plan_budget(budget, 0, 1, 1)
        for _ in range(3 if took_s else 0):
            started_s = clock[0]
            clock[0] += took_s
            budget.end_short_step(started_s, is_kept=False)
        budget.end_short_step(clock[0], is_kept=True)  # says nothing about the time that others take
    left_s = 60 - 12 - 5 * 4
    assert quick.deadline_s() == pytest.approx(clock[0] + max(left_s / 2, steps.MIN_TRAINING_S))
    assert slow.deadline_s() is None
    assert slow.least_minutes == math.ceil((60 + steps.MIN_TRAINING_S - (60 - 12 - 8 * steps.SCORING_S)) / 60)


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
    assert "; pip install 'gpsd-dist[baselines]'" in capsys.readouterr().err
    assert set(runner.floor("rates", "valid")) == {"click", "buy"}
    assert [title for title, _ in runner.commands] == ["boosted trees on valid", "smoothed rates on valid"]


def test_scoring_leaves_threads_and_log_of_a_notebook_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "process_group", lambda timeout_s: contextlib.nullcontext("a group of one"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    logger, threads = logging.getLogger("gpsd_dist"), torch.get_num_threads()
    before = logger.level, logger.propagate, logger.handlers
    try:
        torch.set_num_threads(3)
        runner = steps.Runner(tmp_path, tmp_path, None, None, steps.Budget(None))
        assert runner._process_of_one() == "a group of one"
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        assert torch.get_num_threads() == 1 and logger.level == logging.WARNING
        runner.close()
        assert torch.get_num_threads() == 3 and (logger.level, logger.propagate, logger.handlers) == before
    finally:
        torch.set_num_threads(threads)
