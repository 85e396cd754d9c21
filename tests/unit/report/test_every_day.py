"""The section of `fit --daily`: what daily.json says is on the page, or the page says why not."""

import itertools
import json

import pytest

from gpsd_dist.checkpoint.storage import write_json
from gpsd_dist.fit.daily_outcome import make
from gpsd_dist.report.page import make_report
from tests.helpers.run_folders import write_run
from tests.unit.fit.test_daily_outcome import scores_of, three_days
from tests.unit.report.test_page import Page

FIGURES = ["AUC by day", "AUC lost by age", "predicted / observed by age", "CPU seconds by day"]


@pytest.fixture
def folder(tmp_path):
    """A finished `fit --daily` of two tasks, with one of its runs."""
    write_run(tmp_path / "run/days/2022-01-08/scratch")
    write_json(tmp_path / "run/fit.json", {"options": {"daily": True}})
    days = three_days()
    scores = [one._replace(columns=one.columns | {"buy": one.columns["click"]}) for one in scores_of(days)]
    write_json(tmp_path / "run/daily.json", make(scores, days, ("click", "buy"), ["2022-01-11"]).record)
    return tmp_path / "run"


def section(page: Page) -> list[tuple[tuple[str, ...], str]]:
    """Texts from the heading "Every day" to the next one."""
    heads = [i for i, (place, _) in enumerate(page.texts) if place[-1] == "h2"]
    first = next(i for i in heads if page.texts[i][1] == "Every day")
    return page.texts[first : next(i for i in heads if i > first)]


def test_verdict_figures_and_numbers_are_on_the_page(folder):
    record, page = json.loads((folder / "daily.json").read_text()), Page(make_report([folder]).html)
    found = section(page)
    texts = [text for _, text in found]
    assert record["verdict"] in texts and record["notes"][0] in texts
    # One training has all tasks, so its cost is drawn once.
    assert [text for place, text in found if place[-1] == "figcaption"] == FIGURES + FIGURES[:-1]
    for line in record["lines"]["buy"]:
        assert any(f"{line['auc']:.4f}" in text for text in texts), line
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert "#every-day" in links and len(set(ids)) == len(ids)


def test_each_kind_of_model_is_a_line_where_it_has_values(folder):
    found = section(Page(make_report([folder]).html))
    until = [i for i, (place, _) in enumerate(found) if place[-1] == "figcaption"] + [len(found)]
    lines = [[t for place, t in found[a:b] if place[-1] == "title"] for a, b in itertools.pairwise(until)]
    both = ["from scratch", "warm start"]
    assert lines == [[*both, "boosted trees"], both, both, both, [*both, "boosted trees"], both, both]


def test_a_small_loss_does_not_fill_its_axis(folder):
    """An axis of AUC would span 0.03 and more."""
    record = json.loads((folder / "daily.json").read_text())
    for line in record["lines"]["click"]:
        line |= {"auc_lost": 0.001, "auc_lost_half_width": 0.0005} if line["of"] == "age" else {}
    write_json(folder / "daily.json", record)
    found = section(Page(make_report([folder]).html))
    start = next(i for i, (_, text) in enumerate(found) if text == "AUC lost by age")
    texts = [text for place, text in found[start : start + 20] if place[-1] == "text"]
    ticks = [float(text) for text in texts[texts.index("age of the model in days") + 1 : texts.index("AUC lost")]]
    assert min(ticks) == 0 and max(ticks) >= 0.03


def test_a_day_without_an_auc_leaves_a_gap(folder):
    record = json.loads((folder / "daily.json").read_text())
    for line in record["lines"]["click"]:
        line |= {"auc": None, "auc_half_width": None} if line.get("day") == "2022-01-10" else {}
    write_json(folder / "daily.json", record)
    report = make_report([folder])
    assert "+- nan" not in report.html and FIGURES[0] in report.html
    texts = [text for _, text in section(Page(report.html))]
    assert texts[texts.index("2022-01-10 from scratch") + 1] == "-"


def test_nothing_scored_shows_the_sentence(folder):
    made = make([], three_days(), ("click",), ["pretraining"])
    write_json(folder / "daily.json", made.record)
    assert made.verdict in [text for _, text in section(Page(make_report([folder]).html))]


def damage(path, change):
    record = json.loads(path.read_text())
    change(record)
    write_json(path, record)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "is missing: this fit --daily was stopped before it judged its days"),
        (lambda path: path.write_text("{"), "daily.json cannot be read"),
        (lambda path: path.write_text("[]"), "daily.json holds nothing that fit --daily writes, left out"),
        (lambda path: path.write_text('{"days": 3}'), "not what fit --daily writes"),
        (lambda path: damage(path, lambda r: r["lines"]["click"][0].update(auc="high")), "not what fit --daily writes"),
        (lambda path: damage(path, lambda r: r["lines"].update(buy=[3])), "not what fit --daily writes"),
    ],
)
def test_absent_or_damaged_is_said_once(folder, spoil, words):
    before = make_report([folder]).num_problems
    spoil(folder / "daily.json")
    report = make_report([folder])
    page = Page(report.html)
    assert len([text for text in page.text_in("li") if words in text]) == 1
    assert report.num_problems == before + 1 and "Every day" not in page.text_in("h2")
    assert FIGURES[0] not in page.text_in("figcaption")
