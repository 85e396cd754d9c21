"""The strategy tables: means and ranges over seeds, what is bold, what is on top of the page."""

import pytest

from gpsd_dist.report import dataset
from gpsd_dist.report.families import group
from gpsd_dist.report.results import task_results
from gpsd_dist.report.run_folder import find_runs, read_runs
from gpsd_dist.report.tables import best_index, mean_cell, metric_text
from tests.helpers.run_folders import STEPS, scored, write_json, write_run


def results(root, index=-1):
    """Task -> result, of the last family."""
    runs = read_runs(find_runs([root])[0])
    return {result.task: result for result in task_results(group(runs, dataset.data_sets(runs)[0])[index])}


def cells(table) -> list[dict]:
    """One dict per row: "split metric" (or the header) -> cell."""
    splits = [name for name, columns in table.spans for _ in range(columns)]
    names = [f"{split} {column.text}".strip() for split, column in zip(splits, table.columns, strict=True)]
    return [dict(zip(names, row.cells, strict=True)) for rows in table.groups for row in rows]


@pytest.fixture
def two_strategies(tmp_path):
    """ST_SF is better on test, NT on valid."""
    for seed, (nt, st_sf) in enumerate([(0.70, 0.60), (0.72, 0.64), (0.74, 0.62)]):
        write_run(tmp_path / f"s{seed}/nt", "NT", seed, auc=nt, scores={"test": scored(0.5 + seed / 100)})
        write_run(tmp_path / f"s{seed}/st_sf", "ST_SF", seed, auc=st_sf, scores={"test": scored(0.8 - seed / 100)})
    return tmp_path


def test_summary_has_mean_and_range_over_seeds(two_strategies):
    nt, st_sf = cells(results(two_strategies)["click"].summary)
    assert (nt["configuration"].text, nt["seeds"].text) == ("NT", "0, 1, 2")
    auc = nt["valid (best step) AUC"]
    assert (auc.text, auc.note, auc.is_strong) == ("0.7200", "0.7000-0.7400", True)
    auc = st_sf["test AUC"]
    assert (auc.text, auc.note, auc.is_strong) == ("0.7900", "0.7800-0.8000", True)
    assert not nt["test AUC"].is_strong and "test rows" not in nt


def test_every_run_has_every_metric_and_seeds_end_with_their_mean(two_strategies):
    table = results(two_strategies)["buy"].every_run
    assert [len(rows) for rows in table.groups] == [4, 4]
    rows = cells(table)
    assert [row["run"].text for row in rows[:4]] == ["s0/nt", "s1/nt", "s2/nt", "mean of 3"]
    first = {name: cell.text for name, cell in rows[0].items()}
    assert first | {"valid (best step) AUC": "0.7000", "test AUC": "0.5000", "test rows": "200"} == first
    expected = {"stage": "finetune", "strategy": "NT", "model": "transformer L4H64A4", "seed": "0"}
    assert first | expected | {"best step": str(STEPS[-2]), "state": "finished"} == first
    assert rows[3]["test AUC"].text == "0.5100" and table.groups[0][3].is_mean


def test_top_of_the_page_is_chosen_on_valid_and_shown_on_test(two_strategies):
    """ST_SF is better on test: choosing by test would be a look at it."""
    highlight = results(two_strategies)["click"].highlight
    assert (highlight.configuration, highlight.value, highlight.what) == ("NT", "0.5100", "click, test AUC")
    assert highlight.note == "mean of 3 seeds; best of 2 on valid"


def test_missing_seed_gives_no_mean(two_strategies):
    (two_strategies / "s1/nt/test.json").unlink()
    nt, st_sf = cells(results(two_strategies)["click"].summary)
    assert (nt["test AUC"].text, nt["test AUC"].note) == ("-", "1 of 3 missing")
    assert not nt["test AUC"].is_strong and not st_sf["test AUC"].is_strong  # nothing to compare with


def test_null_in_a_score_is_nan_and_never_best(two_strategies):
    write_json(two_strategies / "s1/st_sf/test.json", scored(0.9, log_loss=None))
    nt, st_sf = cells(results(two_strategies)["click"].summary)
    assert (st_sf["test log loss"].text, st_sf["test log loss"].note) == ("NaN", "")
    assert not st_sf["test log loss"].is_strong and nt["test log loss"].text == "0.5000"


def test_scored_valid_replaces_the_validation_of_the_run(tmp_path):
    write_run(tmp_path / "a", auc=0.7, scores={"valid": scored(0.9), "holdout": scored(0.6), "test": scored(0.5)})
    (row,) = cells(results(tmp_path)["click"].summary)
    assert row["valid (best step) AUC"].text == "0.9000"
    assert [name for name in row if name.endswith("AUC")] == ["valid (best step) AUC", "test AUC", "holdout AUC"]


def test_refit_has_no_valid_and_is_shown_with_its_test(tmp_path):
    folder = write_run(tmp_path / "a", scores={"test": scored(0.8)}, options={"refit_of": "gone"})
    write_json(folder / "checkpoints/best.json", {"step": STEPS[-1], "metrics": {}})
    result = results(tmp_path)["click"]
    (row,) = cells(result.summary)
    assert row["test AUC"].text == "0.8000" and not any(name.startswith("valid") for name in row)
    assert (result.highlight.configuration, result.highlight.value) == ("NT refit", "0.8000")


def test_choice_on_valid_is_shown_with_the_test_of_its_refit(tmp_path):
    """The tuned runs were not scored; ST_SF's refit is better on test, but NT was better on valid."""
    for strategy, valid, test in (("NT", 0.8, 0.6), ("ST_SF", 0.7, 0.9)):
        tuned = write_run(
            tmp_path / f"tune/{strategy}", strategy, auc=valid, init_checkpoint="" if strategy == "NT" else "p"
        )
        for seed in (0, 1):
            options = {"refit_of": str(tuned), "init_checkpoint": "" if strategy == "NT" else "p"}
            folder = write_run(
                tmp_path / f"final/{strategy}{seed}", strategy, seed, options=options, scores={"test": scored(test)}
            )
            write_json(folder / "checkpoints/best.json", {"step": STEPS[-1], "metrics": {}})
    highlight = results(tmp_path)["click"].highlight
    assert (highlight.configuration, highlight.value, highlight.what) == ("NT refit", "0.6000", "click, test AUC")
    assert highlight.note == "mean of 2 seeds; best of 2 on valid"


def test_pretraining_is_judged_by_its_ranks(tmp_path):
    write_run(tmp_path / "a", stage="pretrain")
    result = results(tmp_path)["next_item"]
    (row,) = cells(result.summary)
    assert row["valid (best step) MRR"].text == "0.0230"
    assert result.highlight.what == "next_item, valid MRR" and result.strips == ()


def test_run_without_any_validation_has_no_table(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "checkpoints/best.json").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "train/loss": 1.0}\n')
    assert results(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("auc", [0.1, 0.3, 0.2], 1),
        ("hr@10", [0.1, 0.3], 1),
        ("log_loss", [0.1, 0.3], 0),
        ("calibration", [0.9, 1.05, 1.2], 1),
        ("auc", [0.1, None, float("nan")], None),
        ("auc", [None, 0.2, 0.1], 1),
        ("rows", [1.0, 2.0], None),
    ],
)
def test_best_knows_the_direction(name, values, best):
    assert best_index(name, values) == best


def test_numbers_are_written_with_what_they_are():
    assert [metric_text("auc", v) for v in (0.73914, None, float("nan"), float("inf"))] == ["0.7391", "-", "NaN", "inf"]
    assert metric_text("rows", 20361.0) == "20,361"
    assert mean_cell("auc", [0.5]).note == "" and mean_cell("auc", []).text == "-"
