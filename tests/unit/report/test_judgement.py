"""What the report says about a score: floors, intervals, groups; and about files that are broken or foreign."""

import json

import pytest

from gpsd_dist.report import dataset
from gpsd_dist.report.beside import find_beside, floors_of
from gpsd_dist.report.families import group
from gpsd_dist.report.figures import _at_least
from gpsd_dist.report.page import make_report
from gpsd_dist.report.results import task_results
from gpsd_dist.report.run_folder import find_runs, read_runs
from tests.helpers.run_folders import STEPS, broken_down, scored, write_json, write_run
from tests.unit.report.test_page import Page


def _result(root, task="click"):
    runs = read_runs(find_runs([root])[0])
    (family,) = group(runs, dataset.data_sets(runs)[0])
    problems: list[str] = []
    floors = floors_of(runs, find_beside([root]).floors, problems)
    found = {result.task: result for result in task_results(family, floors)}
    return found[task], problems


def _floor(root, name, auc, **changes):
    write_json(root / f"floors/{name}/test.json", {task: v | changes for task, v in broken_down(auc).items()})


@pytest.mark.parametrize(
    ("floor", "kind", "words"),
    [
        (0.70, "above", "0.1000 +- 0.0283 (unpaired) above boosted trees (0.7000 +- 0.0200), which needs no model."),
        (0.79, "open", "Cannot tell: NT has a test AUC of 0.8000 +- 0.0200, boosted trees"),
        (
            0.90,
            "below",
            "0.1000 +- 0.0283 (unpaired) below boosted trees (0.9000 +- 0.0200), which needs no model: "
            "use that instead.",
        ),
    ],
)
def test_a_score_is_judged_by_the_strongest_floor(tmp_path, floor, kind, words):
    write_run(tmp_path / "a", scores={"test": broken_down(0.8)})
    _floor(tmp_path, "gbdt", floor)
    _floor(tmp_path, "rates", floor - 0.05)
    _floor(tmp_path, "gbdt_refit", 0.99)  # of a refit's rows: not of this run
    result, problems = _result(tmp_path)
    judged = result.highlight.judgement
    assert judged.kind == kind and words in judged.sentence and problems == []
    names = [row.cells[0].text for row in result.summary.groups[1]]
    assert names == ["smoothed rates", "boosted trees", "boosted trees refit"]


def test_what_a_floor_does_not_have_is_left_out(tmp_path):
    write_run(tmp_path / "a", scores={"test": broken_down(0.8)})
    _floor(tmp_path, "popularity", 0.6, log_loss=None)
    table = _result(tmp_path)[0].summary
    cells = dict(zip([column.text for column in table.columns], table.groups[1][0].cells, strict=True))
    assert (cells["AUC"].text, cells["log loss"].text) == ("0.6000", "-")


def test_a_refit_is_compared_with_refitted_trees(tmp_path):
    folder = write_run(tmp_path / "a", scores={"test": broken_down(0.8)}, options={"refit_of": "gone"})
    write_json(folder / "checkpoints/best.json", {"step": STEPS[-1], "metrics": {}})
    _floor(tmp_path, "gbdt", 0.95)
    _floor(tmp_path, "gbdt_refit", 0.6)
    assert "above boosted trees refit" in _result(tmp_path)[0].highlight.judgement.sentence


def test_a_score_that_is_not_defined_is_not_judged(tmp_path):
    """A split with clicks alone has no AUC: that is no reason to take a floor."""
    write_run(tmp_path / "a", scores={"test": broken_down(0.8) | {"click": {"auc": None, "log_loss": 0.3}}})
    _floor(tmp_path, "gbdt", 0.7)
    judged = _result(tmp_path)[0].highlight.judgement
    assert (judged.kind, judged.remedy) == ("unknown", "")
    assert judged.sentence == "NT has no test AUC: click has labels of one class there, or none."


def test_without_a_floor_the_command_is_given(tmp_path):
    write_run(tmp_path / "a", scores={"test": scored(0.8)})
    judged = _result(tmp_path)[0].highlight.judgement
    assert judged.kind == "unknown" and "No floor was scored on test" in judged.sentence
    assert judged.remedy.endswith(f"--split test --metrics_out {tmp_path}/floors/gbdt/test.json")


def test_a_floor_of_other_data_is_left_out_and_named(tmp_path):
    write_run(tmp_path / "a", scores={"test": broken_down(0.8)})
    _floor(tmp_path, "gbdt", 0.7, rows=199)
    result, problems = _result(tmp_path)
    assert len(result.summary.groups) == 1 and result.highlight.judgement.kind == "unknown"
    assert ["gbdt is of other data (199 rows of click in test, " in problem for problem in problems] == [True]


def test_floors_on_valid_come_from_the_outcome_of_the_run(tmp_path):
    folder = write_run(tmp_path / "a", auc=0.8)
    floors = {"rates/click/auc": 0.6, "popularity/click/auc": 0.55}
    write_json(folder / "outcome.json", {"ended": "trained to its last step, 40", "floors": floors})
    result, _ = _result(tmp_path)
    assert [row.cells[0].text for row in result.summary.groups[1]] == ["popularity", "smoothed rates"]
    judged = result.highlight.judgement
    assert "above smoothed rates (0.6000)" in judged.sentence and "--baseline gbdt" in judged.remedy
    assert "trained to its last step, 40" in make_report([tmp_path]).html


def test_intervals_stand_beside_scores_of_old_files_too(tmp_path):
    write_run(tmp_path / "a", scores={"test": scored(0.8, label_rate=0.25)})
    (row,) = _result(tmp_path)[0].summary.groups[0]
    notes = {cell.text: cell.note for cell in row.cells}
    assert notes["0.8000"].startswith("+- 0.0")  # by Hanley and McNeil, from 50 positives of 200
    assert _result(tmp_path)[0].highlight.width == notes["0.8000"]


def test_groups_have_figures_and_tables_and_old_files_say_what_is_missing(tmp_path):
    write_run(tmp_path / "a", scores={"test": broken_down(0.8)})
    write_run(tmp_path / "b", "ST_SF", scores={"test": scored(0.8)})
    _floor(tmp_path, "gbdt", 0.7)
    result, _ = _result(tmp_path)
    titles = [figure.title if figure else None for figure, _ in result.groups]
    assert titles == ["test AUC by history length, click", "test AUC by known or new item, click", None]  # one day
    rows = [[cell.text for cell in row.cells] for row in result.groups[0][1].groups[0]]
    assert rows[1] == ["1-2", "60", "20", "0.8000", "0.7000"]
    new = result.groups[1][1].groups[0][1].cells
    assert (new[0].text, new[3].text) == ("new", "NaN")
    page = Page(make_report([tmp_path]).html)
    assert "calibration on test, click" in page.text_in("figcaption") and result.without_groups == "b"
    assert any("by history length, item and day of b on test" in text for _, text in page.texts)


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"half_width": {}},
        {"half_width": {"auc": "x"}, "calibration": [], "groups": {}},
        {"half_width": {}, "calibration": [{"rows": 1}], "groups": {}},
        {"half_width": {}, "calibration": [], "groups": {"day": [{"name": "x"}]}},
    ],
)
def test_a_broken_breakdown_is_named_and_the_scores_are_read(tmp_path, broken):
    scores = {task: values | {"breakdown": broken} for task, values in scored(0.8).items()}
    write_run(tmp_path / "a", scores={"test": scores})
    report = make_report([tmp_path])
    assert report.html.count("breakdown has another form than gpsd_dist.evaluate writes") == 2
    assert "0.8000" in report.html


def test_runs_of_other_batches_are_drawn_by_epoch(tmp_path):
    write_run(tmp_path / "a")
    folder = write_run(tmp_path / "b", seed=1)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(entry | {"epoch": entry["step"] / 10}) + "\n" for entry in entries)
    text_by_step = make_report([tmp_path]).html
    (folder / "metrics.jsonl").write_text(text)
    html = make_report([tmp_path]).html
    assert "valid AUC, click by epoch" in html and "valid AUC, click by step" not in html
    assert "valid AUC, click by step" in text_by_step and "axis counts epochs" not in text_by_step


def test_early_stopping_is_marked(tmp_path):
    write_run(tmp_path / "a")
    assert "A cross marks" not in make_report([tmp_path]).html
    write_run(tmp_path / "b", seed=1, options={"train.patience": 1})  # the best was the last but one
    html = make_report([tmp_path]).html
    assert "A cross marks where early stopping ended a run" in html


def test_an_axis_does_not_blow_up_noise():
    low, high = _at_least((0.7410, 0.7412))
    assert high - low == pytest.approx(0.05 * 0.7412) and low < 0.7410 and high > 0.7412
    assert _at_least((0.5, 0.9)) == (0.5, 0.9) and _at_least((-1.0, -0.2)) == (-1.0, -0.2)


def test_long_labels_are_whole(tmp_path):
    name = "a_model_with_a_very_long_name_that_someone_chose_with_care"
    for strategy in ("NT", "ST_SF"):
        for model in ("din", name):
            write_run(tmp_path / f"{model}{strategy}", strategy, options={"model.name": model}, auc=0.7)
    strips = [figure.svg for figure in _result(tmp_path)[0].strips]
    assert strips and all(name in svg.replace("\n", "") and ".." not in svg.split("<title")[0] for svg in strips)


def _summary(verdict):
    row = {"task": "click", "auc": 0.7, "auc_half_width": 0.01, "gauc": 0.6, "log_loss": None, "valid_auc": None}
    floor = row | {"label": "boosted trees", "kind": "floor", "auc": 0.65}
    model = row | {"label": "ST_SF", "kind": "model", "minus_floor": 0.05, "minus_floor_half_width": 0.012}
    written = {"verdict": verdict, "verdicts": {"click": verdict}, "next": ["try more"], "chosen": "ST_SF"}
    return {"rows": [model], "floors": [floor], "refit": []} | written


def test_the_verdict_of_a_fit_stands_at_the_top(tmp_path):
    write_run(tmp_path / "st_sf", "ST_SF")
    write_json(tmp_path / "summary.json", _summary("ST_SF is 0.050 +- 0.012 above boosted trees."))
    page = Page(make_report([tmp_path]).html)
    assert "ST_SF is 0.050 +- 0.012 above boosted trees." in page.text_in("strong")
    assert {"+0.0500 +- 0.012", "boosted trees", "try more"} <= {text for _, text in page.texts}
    write_json(tmp_path / "summary.json", {"verdicts": {"click": "x"}, "rows": [{}]})
    assert "not the summary.json of a fit" in make_report([tmp_path]).html


def test_serving_benchmarks_are_shown(tmp_path):
    write_run(tmp_path / "a")
    measured = {"all_cpu_ms": {"median": 2.5, "min": 2.25, "max": 3.0}, "scenario": "cost", "history": 50}
    write_json(tmp_path / "serving/cost.json", measured | {"candidates": 100, "machine_load": [0.5, 1.5], "cores": 2})
    texts = {text for _, text in Page(make_report([tmp_path]).html).texts}
    assert {"all_cpu_ms: 2.5 (2.25 to 3)", "0.5 to 1.5 of 2 cores", "cost"} <= texts


def test_predictions_with_labels_are_scored(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    write_run(tmp_path / "a")
    folder = tmp_path / "predicted"
    write_json(folder / "predictions.json", {"tasks": ["click"], "files": ["part.parquet"], "candidates": 4,
                                             "split": "test", "data": "data/x", "version": "step 3"})  # fmt: skip
    columns = {"user_id": ["a", "a", "b", None], "request_time_s": [1, 2, 3, 4]}
    columns |= {"click.logit": [0.1, 0.2, 0.3, 0.4], "click.label": [0, 1, 1, None]}
    pq.write_table(pa.table(columns), folder / "part.parquet")
    texts = {text for _, text in Page(make_report([tmp_path]).html).texts}
    assert {"Predictions", "data/x test", "step 3", "1.0000"} <= texts
    (folder / "part.parquet").write_text("no")
    assert "its predictions cannot be scored" in make_report([tmp_path]).html
