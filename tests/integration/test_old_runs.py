"""Runs of commit 14e4532, from before the modules moved, go on with the code of today: tests/assets/run_14e4532."""

import json
import pathlib
import shutil

import pytest

from gpsd_dist import evaluate
from gpsd_dist.checkpoint import manager
from gpsd_dist.config import run_config_from_dict
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import differing, edit_state, read_checkpoint, step_folder, tiny_run, train_losses

ASSET = pathlib.Path(__file__).resolve().parents[1] / "assets" / "run_14e4532"
EXPECTED = json.loads((ASSET / "expected.json").read_text())
STEPS, MORE_STEPS = 3, 6
# The commit's numbers were made on one machine. With its three kernels (default, avx2, avx512) losses of today are
# off by 9e-8 at most; another processor may round in other places, and Adam amplifies that near gradients of zero.
ROUNDING = 1e-4


@pytest.fixture
def old(tmp_path):
    return pathlib.Path(shutil.copytree(ASSET, tmp_path / "old"))


@pytest.mark.parametrize("name", ["pretrain", "st_sf"])
def test_an_old_run_is_resumed(old, one_rank, name):
    saved = json.loads((old / name / "run_config.json").read_text())
    saved |= {"data_dir": str(old / "data"), "output_dir": str(old / name)}  # folders may change
    saved["init_checkpoint"] = saved["init_checkpoint"] and str(old / "pretrain")
    saved["train"]["max_steps"] = MORE_STEPS
    Trainer(run_config_from_dict(saved), one_rank).train()
    losses = {int(step): loss for step, loss in EXPECTED[name]["losses"].items()}
    assert list(losses) == list(range(1, MORE_STEPS + 1))
    assert train_losses(old / name) == pytest.approx(losses, rel=ROUNDING)


def test_an_old_run_with_int8_rows_is_refused_with_the_commit_that_reads_it(old, one_rank):
    checkpoint = manager.find(old / "st_sf", "last")
    saved = json.loads((old / "st_sf/run_config.json").read_text())
    saved["tables"]["frozen_dtype"] = "int8"
    with pytest.raises(ValueError, match="commit 14e4532"):
        run_config_from_dict(saved)
    edit_state(checkpoint, lambda state: state["run_config"]["tables"].update(frozen_dtype="int8"))
    saved |= {"data_dir": str(old / "data"), "output_dir": str(old / "st_sf"), "init_checkpoint": str(old / "pretrain")}
    saved["tables"]["frozen_dtype"] = "fp16"
    with pytest.raises(ValueError, match="commit 14e4532"):
        Trainer(run_config_from_dict(saved), one_rank)
    with pytest.raises(ValueError, match="commit 14e4532"):
        evaluate.evaluate_checkpoint(str(old / "st_sf"), str(old / "data"), "test", one_rank, "last")


@pytest.mark.parametrize(("name", "split"), [("pretrain", "valid"), ("st_sf", "test")])
def test_an_old_checkpoint_is_evaluated(old, one_rank, name, split):
    scores = evaluate.evaluate_checkpoint(str(old / name), str(old / "data"), split, one_rank, "last")
    assert set(scores) == set(EXPECTED[name]["scores"])
    for task, values in EXPECTED[name]["scores"].items():
        assert scores[task] == pytest.approx(values, rel=ROUNDING), task


def test_a_run_starts_from_an_old_checkpoint(old, tmp_path, one_rank):
    run = tiny_run(
        "finetune", old / "data", tmp_path / "new", "FT_SF", old / "pretrain", train={"max_steps": 2, "keep_last": 9}
    )
    Trainer(run, one_rank).train()
    before = read_checkpoint(manager.find(old / "pretrain", "last"))
    after = read_checkpoint(step_folder(tmp_path / "new", 2))
    assert not differing({"table.item": before["table.item"]}, {"table.item": after["table.item"]}), "frozen"
