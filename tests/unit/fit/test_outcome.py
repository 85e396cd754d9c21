"""Hints about trainings that ended too early, and the script of commands."""

import types

from gpsd_dist.fit import outcome


def _state(epochs: int):
    return types.SimpleNamespace(run_config={"train": {"epochs": epochs}})


def test_what_ended_too_early_is_said_with_the_option_that_helps():
    rising = [("NT", _state(4)), ("FT_SF", _state(6)), ("pretraining", _state(10))]
    budget = types.SimpleNamespace(least_minutes=4)
    runner = types.SimpleNamespace(cut=["runs/a/nt"], left_out=["FT_SF"], rising=rising, budget=budget)
    assert list(outcome._about_the_time(runner)) == [
        "--budget_minutes ended runs/a/nt early: delete those folders and run again without it",
        "--budget_minutes left out FT_SF: the same command goes on with them, given time (--budget_minutes 4 or more)",
        "NT, FT_SF: the last validation was the best; try --gin.EPOCHS=12 with another --out",
        "pretraining: the last validation was the best; try --pretrain_gin.EPOCHS=20 with another --out",
    ]
    assert not list(outcome._about_the_time(types.SimpleNamespace(cut=[], left_out=[], rising=[])))


def test_commands_are_quoted_for_a_shell():
    text = outcome.script([("pretrain", ("-m", "gpsd_dist.train", "--gin.DATA_DIR=my data"))])
    assert text.splitlines()[2:] == ["# pretrain", "python -m gpsd_dist.train '--gin.DATA_DIR=my data'"]
