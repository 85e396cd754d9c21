"""One sentence: above, below, or cannot tell; and what to try next."""

import dataclasses

import numpy as np
import pytest

from gpsd_dist import schema
from gpsd_dist.fit.data_check import Facts, SplitFacts
from gpsd_dist.fit.verdict import Entry, hints, judge, verdict
from tests.helpers.synthetic import make_manifest

USERS, ROWS = 400, 8


def entry(label: str, kind: str, signal: float, seed: int = 0, strategy: str = "") -> Entry:
    """Scores of normal noise, shifted for positives; every entry has the same users and labels."""
    random = np.random.default_rng(7)
    label_N = (random.random(USERS * ROWS) < 0.3).astype(np.uint8)
    noise_N = np.random.default_rng((8, seed)).normal(size=len(label_N))
    score_N = (noise_N + signal * label_N).astype(np.float32)
    columns = {"score": score_N, "label": label_N, "user_hash": np.repeat(np.arange(USERS), ROWS)}
    return Entry(label, kind, {"click": 0.5}, {"click": {"auc": 0.5}}, {"click": columns}, strategy, weights=7000)


def facts(**changes) -> Facts:
    manifest = dataclasses.replace(
        make_manifest(), splits=(schema.Split("pretrain", ("pretrain/x",), 9, 90_000, 0, None, None),)
    )
    one = dataclasses.replace(SplitFacts(10_000, 3000, 900, 20.0, 0.01), **changes)
    return Facts(manifest, dict.fromkeys(("train", "valid", "test"), one), can_pretrain=True)


def sentence(*entries: Entry, best: int = -1, **changes) -> str:
    judged = judge(entries, "click")
    return verdict("click", judged[best], judged, facts(**changes))


FLOORS = (entry("popularity", "floor", 0.2, 1), entry("boosted trees", "floor", 0.8, 2))


def test_a_model_that_is_better_is_said_to_be_above_the_strongest_floor():
    said = sentence(*FLOORS, entry("FT_SF", "model", 1.6, 3))
    assert said.startswith("FT_SF is 0.1") and " above boosted trees (click AUC on test 0.8" in said
    assert " +- 0.0" in said and said.endswith(").")


def test_a_refit_is_named_so_and_compared_with_refitted_trees_alone():
    trees_again = entry("boosted trees refit", "floor_refit", 1.2, 6)
    nt, refit = entry("NT", "model", 1.0, 4), entry("NT refit", "refit", 1.6, 3)
    said = sentence(*FLOORS, trees_again, nt, refit)
    assert said.startswith("NT refit is 0.0") and " above boosted trees refit (click AUC on test 0.8" in said
    assert said.endswith("; refit: trained again on train + valid).")
    assert " above boosted trees (" in sentence(*FLOORS, trees_again, nt)  # though the refitted ones are stronger
    rates = entry("smoothed rates", "floor", 1.4, 5)  # have one form alone
    assert " above smoothed rates (" in sentence(*FLOORS, rates, trees_again, nt, refit)
    weak = sentence(*FLOORS, trees_again, nt, entry("NT refit", "refit", 0.9, 3))
    assert weak.startswith("What valid chose does not beat boosted trees refit: NT refit is ")  # NT beats its trees


def test_inside_the_interval_it_cannot_tell():
    said = sentence(*FLOORS, entry("FT_SF", "model", 0.8, 3))
    assert said.startswith("Cannot tell: FT_SF and boosted trees differ by ") and "may be chance" in said


@pytest.mark.parametrize(
    ("changes", "look_at"),
    [
        ({"history": 1.5}, "look at the histories (1.5 events on average"),
        ({"unknown": 0.4, "positives": 200}, "look at the amount of data: 200 pos"),  # the items have attributes
        ({"unknown": 0.4, "positives": 10_000}, "(40% of the test candidates are new): give them more attributes"),
        ({"positives": 200}, "look at the amount of data: 200 positives for 7,000 weights. Use the floor until"),
        ({"positives": 10_000}, "look at the curves in the report"),
    ],
)
def test_below_a_floor_it_says_what_to_look_at(changes, look_at):
    said = sentence(*FLOORS, entry("NT", "model", 0.1, 3), **changes)
    assert said.startswith("Nothing here beats boosted trees: NT is 0.1") and " below (" in said and look_at in said


def test_fewer_weights_are_not_advised_where_the_smallest_model_was_fitted():
    said = {name: dataclasses.replace(entry("NT", "model", 0.1, 3), model=name) for name in ("l4h64a4", "l1h32a4")}
    assert sentence(*FLOORS, said["l4h64a4"], positives=200).endswith("or try fewer weights: --models l1h32a4.")
    assert sentence(*FLOORS, said["l1h32a4"], positives=200).endswith("Use the floor until the log is longer.")


def test_new_items_without_attributes_are_suspected_before_few_positives():
    looked = facts(unknown=0.4, positives=200)
    kept = tuple(f for f in looked.manifest.features if f.name == "item" or "candidate" not in f.places)
    looked = dataclasses.replace(looked, manifest=dataclasses.replace(looked.manifest, features=kept))
    judged = judge((*FLOORS, entry("NT", "model", 0.1, 3)), "click")
    said = verdict("click", judged[-1], judged, looked)
    assert "look at the items (40% of the test candidates are new): give them attributes, section [items]" in said


def test_a_budget_is_the_first_suspect():
    judged = judge((*FLOORS, entry("NT", "model", 0.1, 3)), "click")
    said = verdict("click", judged[-1], judged, facts(history=1.5), is_short=True)
    assert said.endswith("look at the time that it got: --budget_minutes ended trainings early.")


def test_a_model_that_valid_did_not_choose_may_be_above_the_floor():
    said = sentence(*FLOORS, entry("ST_SF", "model", 1.6, 5), entry("NT", "model", 0.1, 3))
    assert said.startswith("What valid chose does not beat boosted trees: NT is ")


def test_nothing_to_judge():
    assert "No model was trained" in verdict("click", None, judge(FLOORS, "click"), facts())
    one_class = entry("FT_SF", "model", 1.0)
    one_class.scores["click"]["label"][:] = 1
    (judged,) = judge([one_class], "click")
    assert judged.auc is None
    said = verdict("click", judged, [judged], facts())
    assert said.startswith(
        "click cannot be judged: 3,200 of 3,200 scored candidates of test have click = 1, and an AUC"
    )
    assert "0 of 0 scored candidates of test have buy = 1" in verdict("buy", judged, [judged], facts())
    assert "no floor could be computed" in sentence(entry("FT_SF", "model", 1.0))


def test_hints_name_what_these_data_show():
    entries = (*FLOORS, entry("NT", "model", 0.4, 4, "NT"), entry("FT_SF", "model", 0.84, 3, "FT_SF"))
    judged = judge(entries, "click")
    found = "\n".join(hints("click", judged[-1], judged, facts(history=1.0, unknown=0.5)))
    expected = ("as many users in test (now 900)", "FT_SF - NT = +0.1", "1.0 events on average")
    for words in (*expected, "50% of the test candidates", "another --seed", "--models"):
        assert words in found
    assert "events per item" not in found  # 90,000 events of 200 items


def test_counts_are_advised_below_a_floor_where_nothing_is_counted():
    judged, looked = judge((*FLOORS, entry("NT", "model", 0.1, 3)), "click"), facts()
    assert "--counts 7d,30d,total" in "\n".join(hints("click", judged[-1], judged, looked))
    counted = schema.Feature("count_total_item", ("candidate",), "numerical", counts="item", log=True)
    manifest = dataclasses.replace(looked.manifest, features=(*looked.manifest.features, counted))
    looked = dataclasses.replace(looked, manifest=manifest)
    assert "--counts" not in "\n".join(hints("click", judged[-1], judged, looked))
    above = judge((*FLOORS, entry("FT_SF", "model", 1.6, 5)), "click")
    assert "--counts" not in "\n".join(hints("click", above[-1], above, facts()))
