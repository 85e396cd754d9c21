"""One page about a data set: what it holds, and what is wrong with it, the worst first."""

import dataclasses
import pathlib
import random
import types

import numpy as np
import pytest

from data_pipeline import inspect, measures
from gpsd_dist import schema
from gpsd_dist.data import data_versions
from tests.assets.cases import logs
from tests.unit.data_pipeline.conftest import run

SCHEMA = """
[exposure]
files = "shown.csv"
user = "user_id"
item = "item_id"
time = "ts"
task = [{ column = "click" }]
extends_history = "click"
feature = [
  { column = "leak", place = "candidate" },
  { column = "price", kind = "numerical", place = "candidate" },
  { column = "clicks_today", kind = "numerical", place = "candidate" },
  { column = "honest", kind = "numerical", place = "candidate" },
]
[split]
valid_fraction = 0.2
test_fraction = 0.3
"""


def suspicious(folder: pathlib.Path) -> pathlib.Path:
    """Impressions with a category made of the label, a price of 1e9, and a count that knows the row's own click."""
    draw, rows = random.Random(5), []
    for day in range(10):
        for user in range(20):
            count = 0
            for step in range(6):
                click = int(draw.random() < 0.4)
                count += click
                price = 1e9 if (day, user, step) == (2, 3, 1) else draw.uniform(1, 9)
                noisy = count - 2.0 * (1 - click)
                moment = 1_700_006_400 + day * 86_400 + step * 1_000 + user
                rows.append(
                    (f"u{user}", f"i{draw.randrange(30)}", moment, click, f"c{click}", price, noisy, draw.random())
                )
    header = "user_id,item_id,ts,click,leak,price,clicks_today,honest"
    return logs.write(folder, SCHEMA, {"shown.csv": logs.lines(rows, header)})


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("inspect")
    assert run("--source", "generic", "--raw_dir", suspicious(root / "raw"), "--out_dir", root / "out") == 0
    return root / "out"


def test_ids_that_are_all_known_are_left_out_and_rare_ones_are_not_0():
    sample = types.SimpleNamespace(unknown={"candidate.item": 0.0, "candidate.brand": 0.0004, "candidate.tab": 0.021})
    section = inspect._unknown({"test": sample})
    assert section.rows == [("candidate.brand", "test", "< 0.1%"), ("candidate.tab", "test", "2.1%")]


def test_splits_without_rows_have_an_advice_of_their_own(built):
    manifest = schema.read_manifest(data_versions.current(built))
    (test,) = (split for split in manifest.splits if split.name == "test")
    splits = tuple(dataclasses.replace(test, name=name, num_rows=0) for name in ("pretrain", "test"))
    first, second, *_ = inspect._verdict(dataclasses.replace(manifest, splits=splits), {})
    assert first == f"split 'pretrain' has no rows: {inspect.NO_HISTORY}"
    assert second == "split 'test' has no rows: move the borders of the splits"


def test_suspects_are_named_and_others_are_not(built):
    sections, verdict = inspect.page(data_versions.current(built))
    text = "\n".join(verdict)
    assert "candidate.leak alone has an AUC of 1.000" in text
    assert "candidate.price has outliers" in text and "1e+09" in text
    assert "candidate.clicks_today orders a user's day by its labels" in text
    assert "honest" not in text
    tables = {section.title: section.rows for section in sections}
    assert ("exposure/shown.csv", "1200") in [row[:2] for row in tables["Raw files, and rows left out"]]
    assert {(task, split, observed) for task, split, observed, *_ in tables["Labels"]} == {
        ("click", "train", "599"),
        ("click", "valid", "241"),
        ("click", "test", "360"),
    }


def test_the_page_is_printed_and_written(built, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert inspect.main([str(built), "--html", str(page)]) == 0
    assert "What to mend first" in capsys.readouterr().out
    text = page.read_text()
    assert "candidate.leak" in text and "<script" not in text


def test_a_raw_log_is_built_aside(tmp_path, capsys):
    raw = suspicious(tmp_path / "raw")
    before = sorted(path.name for path in raw.iterdir())
    assert inspect.main([str(raw)]) == 0
    assert "candidate.leak alone" in capsys.readouterr().out
    assert sorted(path.name for path in raw.iterdir()) == before
    assert inspect.main([str(tmp_path / "nothing")]) == 2


def test_weights_and_rates_are_shown(tmp_path):
    """The first row is a negative of weight 100, others have 1; each negative stands for four."""
    logs.weighted(tmp_path / "raw", w=[100.0] + [1.0] * 239, r=[0.25] * 240)
    assert run("--source", "generic", "--raw_dir", tmp_path / "raw", "--out_dir", tmp_path / "out") == 0
    sections, verdict = inspect.page(data_versions.current(tmp_path / "out"))
    tables = {section.title: section.rows for section in sections}
    weight, *_ = [row for row in tables[inspect.SAMPLING] if row[:2] == ("sampling.weight", "train")]
    count = int(tables["Labels"][0][2].replace(",", ""))
    assert weight[2:6] == ("1", "1", "1", "100") and weight[-1] == f"{100 / (count + 99):.1%}"
    (_, _, observed, positive, plain, weighted), *_ = tables["Labels"]
    whole = int(positive) + 4 * (int(observed) - int(positive) + 99)
    assert weighted == f"{int(positive) / whole:.2%}" != plain
    assert any("one candidate of 'train' has" in text for text in verdict)


def test_auc_counts_ties_half():
    score, label = np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.0, 1.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in score[label == 1] for n in score[label == 0]]
    assert measures.auc(score, label) == pytest.approx(np.mean(pairs))
    assert np.isnan(measures.auc(score, np.ones(4)))
