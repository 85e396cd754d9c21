"""The page as HTML, and the command that writes it. In a browser: tests/integration/test_report_page.py."""

import html.parser
import os
import re
import shutil

import pytest

from gpsd_dist.report import __main__ as report
from gpsd_dist.report.page import make_report
from tests.helpers.run_folders import STEPS, scored, write_data, write_json, write_run

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Every element with its attributes, and the text by the tags around it; checks that tags match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((tuple(self.open), " ".join(data.split())))

    def text_in(self, tag: str) -> list[str]:
        return [text for place, text in self.texts if place[-1] == tag]


def several_runs(root):
    """Two seeds of NT and ST_SF and their pretraining, with scores."""
    pretrain = write_run(root / "pretrain", stage="pretrain")
    for seed in (0, 1):
        scores = {"test": scored(0.7 + seed / 100)}
        write_run(root / f"s{seed}/nt", "NT", seed, scores=scores)
        write_run(root / f"s{seed}/st_sf", "ST_SF", seed, init_checkpoint=pretrain, scores=scores)
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_report([several_runs(tmp_path_factory.mktemp("runs"))]).html


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_sections_and_figures_are_there(page):
    headings = [*page.text_in("h2"), *page.text_in("h3")]
    wanted = ["data/handmade: pretraining", "data/handmade: finetuning", "Speed and memory", "Data", "Configuration"]
    wanted += ["Table plan", "Environment", "Run it again", "Results: click", "Results: buy", "Generalization gap"]
    assert set(wanted) <= set(headings)
    titles = page.text_in("figcaption")
    for task in ("click", "buy"):
        assert {f"valid AUC, {task}", f"valid log loss, {task}", f"generalization gap, {task}"} <= set(titles)
        assert {f"{task}: NT", f"{task}: ST_SF", f"test AUC, {task}"} <= set(titles)
    assert {"training loss", "valid MRR, next_item", "learning rate of the tower"} <= set(titles)
    assert len(titles) == len([1 for tag, attributes in page.elements if attributes.get("class") == "figure"])


def test_one_line_per_run_on_one_axis(page):
    at = next(i for i, (_, text) in enumerate(page.texts) if text == "valid AUC, click")
    until = next(i for i, (place, _) in enumerate(page.texts) if i > at and place[-1] == "figcaption")
    lines = [text for place, text in page.texts[at:until] if place[-1] == "title"]
    runs = [("NT", 0, "s0/nt"), ("NT", 1, "s1/nt"), ("ST_SF", 0, "s0/st_sf"), ("ST_SF", 1, "s1/st_sf")]
    assert lines == [f"{strategy}, seed {seed} ({label})" for strategy, seed, label in runs]


def test_page_loads_nothing_and_runs_nothing(page, text):
    loading = {"script", "img", "iframe", "object", "embed", "base", "form", "video", "audio", "source"}
    assert not loading & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", text)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= namespaces


def test_ids_are_unique_and_links_have_targets(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert len(links) >= 8 and {link[1:] for link in links} <= set(ids)


@pytest.mark.parametrize(
    ("folders", "links"),
    [
        (("a/x", "a/y"), ["x: finetuning", "y: finetuning"]),
        (("a/1/x", "a/2/x"), ["1/x: finetuning", "2/x: finetuning"]),
    ],
)
def test_links_at_the_top_can_be_told_apart(tmp_path, folders, links):
    for number, folder in enumerate(folders):
        write_run(tmp_path / f"runs/{number}", data_dir=write_data(tmp_path / folder))
    found = Page(make_report([tmp_path / "runs"]).html)
    assert [text for tags, text in found.texts if "nav" in tags and ":" in text] == links


def test_equal_files_give_equal_bytes(tmp_path):
    """Also when the files are written in another order; nothing but the folder's name may enter."""
    first = several_runs(tmp_path / "a/runs")
    shutil.copytree(first, tmp_path / "copy", symlinks=True)
    before = make_report([first]).html
    shutil.rmtree(first)
    for path in sorted(os.listdir(tmp_path / "copy"), reverse=True):
        shutil.copytree(tmp_path / "copy" / path, first / path)
    assert make_report([first]).html == before


def test_names_from_files_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = write_run(tmp_path / "<i>run&amp;", options={"data_dir": evil, "model.name": evil, evil: "<b>"})
    write_run(tmp_path / "other", seed=1, options={"data_dir": evil})
    (folder / "plan.txt").write_text(evil)
    environment = {"argv": ["train.py", evil], "commit": evil, "device": evil, "versions": {"<u>": "<u>"}}
    write_json(folder / "environment.json", environment)
    write_json(folder / "test.json", {"<u>": {"<u>": 1.0}})
    write_json(folder / "<u>.json", {"click": {"auc": 0.5}})
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 1, "valid/<u>/auc": 0.5, "train/<u>_loss": 1, "valid/<u>/log_loss": 1}\n'
    )
    page = Page(make_report([tmp_path]).html)
    assert not {"script", "i", "u"} & {tag for tag, _ in page.elements}
    everything = " ".join(text for _, text in page.texts)
    assert everything.count(evil) > 5 and "valid AUC, <u>" in everything and "<i>run&amp;" in everything


def test_missing_and_broken_files_are_named_on_the_page(tmp_path):
    folder = write_run(tmp_path / "runs/a")
    (folder / "plan.txt").unlink()
    (folder / "environment.json").write_text("{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "epoch": 2.5, "valid/click/auc": null}\n')
    write_json(tmp_path / "runs/killed/run_config.json", {})
    report = make_report([tmp_path / "runs"])
    page = Page(report.html)
    told = page.text_in("li")
    for words in ("plan.txt is missing", "environment.json is not valid JSON", "valid/click/auc (1 x)", "killed: "):
        assert len([text for text in told if words in text]) == 1, words
    assert report.num_problems == 5  # and the data folder
    assert f"{report.num_problems} things to know about these files" in page.text_in("h2")
    everything = [text for _, text in page.texts]
    assert "None of the runs has a plan.txt." in everything and "The command line was not recorded." in everything


def test_smallest_run_folder_still_gives_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("")
    report = make_report([tmp_path / "run"])
    page = Page(report.html)
    assert report.num_runs == 1 and page.text_in("h1") == ["Run run"]
    told = " ".join(page.text_in("li"))
    for name in ("run_config.json", "environment.json", "plan.txt", "config.gin", "best.json"):
        assert f"{name} is missing" in told


def test_not_finite_values_leave_the_others(tmp_path):
    folder = write_run(tmp_path / "a")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"train/loss": [\d.]+', '"train/loss": null', text))
    titles = Page(make_report([tmp_path]).html).text_in("figcaption")
    assert "training loss" not in titles and "training loss, click" in titles


def test_refit_is_not_blamed_for_having_no_validation(tmp_path):
    tuned = write_run(tmp_path / "a")
    shutil.copytree(tuned, tmp_path / "c")
    for name, options in (("b", {"refit_of": str(tuned)}), ("d", {})):
        folder = write_run(tmp_path / name, options=options)
        (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "train/loss": 1.0}\n')
    text = make_report([tmp_path]).html
    assert "not recorded by d<" in text and "not recorded by b" not in text
    assert "A refit trains on valid too" in text


def test_command_writes_the_page_and_says_so(tmp_path, capsys):
    several_runs(tmp_path / "runs")
    out = tmp_path / "new/folder/page.html"
    assert report.main([str(tmp_path / "runs/s0"), str(tmp_path / "runs/s1/nt"), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!DOCTYPE html>") and f"{out}: 3 runs" in capsys.readouterr().out


def test_command_refuses_a_folder_without_runs(tmp_path, capsys):
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "looked for metrics.jsonl" in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_best_step_is_ringed(page, text):
    assert str(STEPS[-2]) in page.text_in("td")
    assert "A ring marks the best step" in text
