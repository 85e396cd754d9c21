"""Cells of the laws suite: which there are, when one runs again, what the table says of them."""

import pytest

from benchmarks.laws import __main__ as command
from benchmarks.laws import dataset, expression, generators, page, reduced, runs
from benchmarks.laws.runs import Cell, Settings
from gpsd_dist.config.model import MODELS
from gpsd_dist.distributed import exit_codes

FAST = Settings(finetune=("EPOCHS=1", "GLOBAL_BATCH_ROWS=64"))


def record(law="order", tower="din", strategy="NT", seed=0, share=0.5, **changed):
    ceiling, auc = {"valid": 0.8, "test": 0.8}, {"valid": 0.6, "test": 0.5 + 0.3 * share}
    numbers = {"task": "click", "ceiling": ceiling, "auc": auc, "share": share, "valid_share": share, "cpu_s": 2.0}
    more = {"steps_to_near": 40, "why_not": "", "curve": []} | changed
    return {"law": law, "tower": tower, "strategy": strategy, "seed": seed, **numbers, **more}


def test_only_towers_that_pretrain_get_a_strategy_and_only_models_seeds():
    found = runs.cells(["order"], ["gbdt", "mlp", "din", "hstu"], ["NT", "FT_SF"], [0, 1])
    assert [(cell.tower, cell.strategy, cell.seed) for cell in found] == [
        *(("gbdt", "", 0), ("mlp", "", 0), ("mlp", "", 1), ("din", "NT", 0), ("din", "NT", 1)),
        *(("hstu", "NT", 0), ("hstu", "NT", 1), ("hstu", "FT_SF", 0), ("hstu", "FT_SF", 1)),
    ]


def test_every_tower_has_a_file_and_every_reason_a_law_and_a_model():
    assert {runs.model_of(tower) for tower in runs.TOWERS} == set(MODELS)
    for law, reasons in expression.UNSEEN.items():
        assert law in generators.LAWS and set(reasons) <= set(MODELS)


def test_a_finished_cell_is_kept_until_an_option_changes(tmp_path):
    made = dataset.prepare("interval", tmp_path / "data", num_users=200)
    cell = Cell("interval", "deepfm")
    first = runs.run_cell(cell, made, tmp_path, FAST)
    mark = tmp_path / "runs/interval/deepfm/NT/s0/mark"
    mark.touch()
    assert runs.run_cell(cell, made, tmp_path, FAST) == first and mark.exists()
    again = runs.run_cell(cell, made, tmp_path, Settings(finetune=(*FAST.finetune, "DENSE_LR=1e-4")))
    assert again["configuration"] != first["configuration"] and not mark.exists()
    assert [step for step, _ in first["curve"]] == sorted({step for step, _ in first["curve"]})
    assert first["share"] == dataset.share(first["auc"]["test"], first["ceiling"]["test"])


def test_a_pretraining_is_shared_by_strategies_and_seeds(tmp_path):
    made = dataset.prepare("recency", tmp_path / "data", num_users=200)
    settings = Settings(both=("EPOCHS=1", "WIDTH=16", "EMBEDDING_DIM=16"))
    first = runs.run_cell(Cell("recency", "l1h32a4", "ST_SF"), made, tmp_path, settings)
    pretrained = tmp_path / "runs/recency/l1h32a4/pretrain/metrics.jsonl"
    changed_s = pretrained.stat().st_mtime_ns
    second = runs.run_cell(Cell("recency", "l1h32a4", "FT_SF", 1), made, tmp_path, settings)
    assert pretrained.stat().st_mtime_ns == changed_s
    assert "failed" not in first and "failed" not in second
    assert first["configuration"]["pretrain"] == second["configuration"]["pretrain"]


def test_a_cell_that_fails_says_why_and_runs_again(tmp_path, capsys):
    options = ["--laws", "interval", "--towers", "deepfm", "--seeds", "0", "--num_users", "200"]
    options += ["--out_dir", str(tmp_path)]
    wrong = ["--set_finetune", "TrainConfig.best_metric=click/none"]
    assert command.main([*options, *wrong]) == 1
    assert "failed: status 2: error: TrainConfig.best_metric 'click/none'" in capsys.readouterr().out
    assert "| `interval` | deepfm NT | failed: status 2" in (tmp_path / "table.md").read_text()
    assert command.main([*options, "--set_finetune", "EPOCHS=1"]) == 0
    assert command.main(["--collect", "--out_dir", str(tmp_path)]) == 0
    assert "| law | ceiling | deepfm NT |" in capsys.readouterr().out
    assert command.main([*options, "--set", "NO_SUCH_NAME=1"]) == 2
    assert "NO_SUCH_NAME" in capsys.readouterr().err


def test_a_signal_ends_the_table_and_not_one_cell(tmp_path, monkeypatch):
    made = dataset.prepare("interval", tmp_path / "data", num_users=200)
    monkeypatch.setattr(runs.train, "main", lambda argv: exit_codes.INTERRUPTED)
    with pytest.raises(SystemExit, match="130"):
        runs.run_cell(Cell("interval", "deepfm"), made, tmp_path, FAST)
    assert runs.finished(tmp_path) == []


def test_the_table_has_mean_spread_and_brackets_where_a_tower_cannot():
    records = [record(seed=n, share=s, why_not="it is blind") for n, s in enumerate((0.4, 0.5, 0.6))]
    records += [record(tower="gbdt", strategy="", share=0.9, steps_to_near=None), record(law="count", share=1.0)]
    text = page.markdown(records)
    assert "| law | ceiling | din NT | gbdt |" in text
    assert "| `order` | 0.800 | (0.500 ± 0.100, 3) | 0.90 |" in text and "| `count` | 0.800 | 1.00 |  |" in text
    assert "- `order`: it is blind." in text
    assert "| `order` | din NT | 0.8000 | 0.6500 | 0.500 | 0.100 | 0.500 | 40 | 2.0 | 3 |" in text
    assert "| `order` | gbdt | 0.8000 | 0.7700 | 0.900 |  | 0.900 |  | 2.0 | 1 |" in text


@pytest.mark.parametrize("share", [float("nan"), -0.1])
def test_a_share_below_its_bound_is_a_problem(share):
    good = [{**record(c.law, c.tower, c.strategy, c.seed), "share": least} for c, least in reduced.LEAST_SHARE.items()]
    assert reduced.problems(good) == []
    failed = {key: value for key, value in good[1].items() if key != "share"}
    assert len(reduced.problems([{**good[0], "share": share}, failed])) == 2
