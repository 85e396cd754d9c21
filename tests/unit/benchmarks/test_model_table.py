"""The table of models: which rows there are, and that a row shows runs of its own options alone."""

import dataclasses
import json
import pathlib

import pytest

from benchmarks import model_table
from gpsd_dist.checkpoint.state import RunState
from gpsd_dist.scaling.runs import PARAMETERS_NAME
from tests.helpers.synthetic import make_manifest

FILE = "configs/experiments/grocery_finetune.gin"


def arguments(out_dir, *more: str) -> list[str]:
    sources = ("--tables_from", "runs/s{seed}/pretrain", "--tower_from", "runs/{model}/pretrain")
    return ["--gin_file", FILE, "--models", "din", *sources, "--out_dir", str(out_dir), *more]


def rows(out_dir, *more: str) -> list[model_table.Row]:
    return model_table.rows_of(model_table._parse(arguments(out_dir, *more)))


def finish(training, progress: dict, **scores: float) -> None:
    """A finished run as far as the table reads it."""
    checkpoint = training.folder / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    state = RunState(
        step=4,
        data_position={"epoch": 1, "step": 0, "order": {"rows": 1, "global_batch": 1}},
        progress={"is_finished": True, "best_step": 4} | progress,
        metrics={"click/auc": progress["best_value"]},
        run_config=dataclasses.asdict(training.run),
        manifest=dataclasses.asdict(make_manifest()),
        world_size=1,
    )
    (checkpoint / "run_state.json").write_text(json.dumps(dataclasses.asdict(state)))
    (training.folder / "run_config.json").write_text(json.dumps(dataclasses.asdict(training.run)))
    (training.folder / model_table.WALL_NAME).write_text("2.0")
    (training.folder / PARAMETERS_NAME).write_text('{"dense_parameters": 7}')
    if scores:
        (training.folder / "test.json").write_text(json.dumps({"click": scores}))


def test_a_model_without_pretraining_has_no_full_transfer(tmp_path, capsys):
    found = rows(tmp_path, "--models", "din,hstu", "--gin", "MAX_HISTORY_LENGTH=40")
    assert [(row.model, row.strategy) for row in found] == [
        ("din", "NT"), ("din", "ST_SF"), ("hstu", "NT"), ("hstu", "ST_SF"), ("hstu", "FT_SF"),
    ]  # fmt: skip
    assert "din FT_SF: din cannot be pretrained" in capsys.readouterr().out
    assert found[1].tuning("1e-3").run.init_checkpoint == "runs/s0/pretrain"
    assert found[4].refit("1e-3", 2).run.init_checkpoint == "runs/hstu/pretrain"


def test_an_option_that_one_of_the_models_does_not_read_is_an_error(tmp_path, capsys):
    options = ("--models", "hstu,din", "--gin", "ModelConfig.max_positions=61", "--print_only")
    assert model_table.main(arguments(tmp_path, *options)) == 2
    error = capsys.readouterr().err
    assert "`ModelConfig.max_positions = 61` has no effect: model 'din' does not read it" in error


def test_a_row_is_the_rate_that_valid_chose(tmp_path, capsys):
    options = ("--strategies", "NT", "--rates", "1e-3,5e-3", "--print_only")
    (row,) = rows(tmp_path, *options)
    finish(row.tuning("1e-3"), {"best_value": 0.64})
    finish(row.tuning("5e-3"), {"best_value": 0.66})
    finish(row.refit("5e-3", 0), {"best_value": 0.0}, auc=0.71, gauc=0.7, log_loss=0.5)
    assert model_table.main(arguments(tmp_path, *options)) == 0
    assert "| din | NT | click | 5e-3 | 0.6600 | 1 | 0.7100 | 0.7000 |  | 0.5000 | 7 | 2 |" in capsys.readouterr().out


def test_floors_stand_above_models_with_the_same_metrics(tmp_path, capsys):
    options = ("--strategies", "NT", "--rates", "default", "--baselines", "rates,gbdt_refit", "--min_item_count", "5")
    (row,) = rows(tmp_path, *options)
    assert not any("DENSE_LR" in part for part in row.tuning("default").command)
    finish(row.tuning("default"), {"best_value": 0.64})
    scores = {"auc": 0.71, "gauc": 0.7, "gauc_user_day": 0.69, "log_loss": 0.5, "auc_item_count@5": 0.74}
    finish(row.refit("default", 0), {"best_value": 0.0}, **scores)
    file = tmp_path / "baselines" / "gbdt_refit" / "test.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"click": scores | {"auc": 0.75}}))
    assert model_table.main(arguments(tmp_path, *options, "--print_only")) == 0
    *_, trees, model = capsys.readouterr().out.splitlines()  # rates were not scored, and --print_only scores nothing
    assert trees == "| gbdt_refit |  | click |  |  |  | 0.7500 | 0.7000 | 0.6900 | 0.5000 | 0.7400 |  |  |"
    assert model.startswith("| din | NT | click | default | 0.6400 | 1 | 0.7100 | 0.7000 | 0.6900 | 0.5000 | 0.7400 |")


def test_baselines_are_scored_once_with_the_options_of_the_models(tmp_path, monkeypatch):
    commands = []

    def execute(command, say):
        commands.append(command)
        file = pathlib.Path(command[-1])
        file.parent.mkdir(parents=True)
        file.write_text('{"click": {"auc": 0.7}}')

    monkeypatch.setattr(model_table, "execute", execute)
    args = model_table._parse(arguments(tmp_path, "--baselines", "rates", "--min_item_count", "5"))
    for _ in range(2):
        assert list(model_table.baseline_results(model_table.rows_of(args), args)) == ["rates"]
    (command,) = commands
    expected = "--baseline rates --data data/grocery --min_item_count 5 --split test"
    assert expected in " ".join(command)


def test_runs_of_other_options_are_not_shown_as_these(tmp_path, capsys):
    """A second rate that wins on valid does not make the refit with the first one its own."""
    (row,) = rows(tmp_path, "--strategies", "NT", "--rates", "1e-3")
    finish(row.tuning("1e-3"), {"best_value": 0.64})
    finish(row.refit("1e-3", 0), {"best_value": 0.0}, auc=0.71, gauc=0.7, log_loss=0.5)
    finish(row.tuning("5e-3"), {"best_value": 0.66})
    for more in ((), ("--print_only",)):
        assert model_table.main(arguments(tmp_path, "--strategies", "NT", "--rates", "1e-3,5e-3", *more)) == 2
        found = capsys.readouterr()
        assert "0.7100" not in found.out
        assert "dense.peak_lr: 0.001 there, 0.005 now" in found.err and "delete that folder" in found.err
    with pytest.raises(ValueError, match=r"dropout: 0\.3 there, 0\.1 now"):
        model_table.run(rows(tmp_path, "--strategies", "NT", "--gin", "DROPOUT=0.1")[0])
