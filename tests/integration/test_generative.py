"""SASRec and HSTU through both stages on one rank: every strategy, and training without a valid split."""

import json

import pytest
import torch

from gpsd_dist.checkpoint import manager
from gpsd_dist.config import STRATEGIES
from gpsd_dist.trained_run import evaluate_checkpoint
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import read_checkpoint, step_folder, tiny_run, train_runs, write_tiny_data

# 14 is stored as 16; the tower is 12 wide, with projections on both sides
OPTIONS = {"tables": {"embedding_dim": 14}, "train": {"max_steps": 3}, "seed": 3}
MODELS = {
    "sasrec": {"name": "sasrec", "width": 12, "heads": 2, "max_positions": 11, "dropout": 0.1},
    "hstu": {"name": "hstu", "width": 12, "heads": 2, "head_width": 5, "max_positions": 11, "dropout": 0.1},
}
PRETRAINING = {"pretrain": {"negatives_per": "position", "num_negatives": 8, "auxiliary": ("category",)}}


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory, data_dir, one_rank):
    """Folder with a run for each strategy, from the pretraining in `source`."""
    root, options = tmp_path_factory.mktemp(request.param), OPTIONS | {"model": MODELS[request.param]}
    runs = [tiny_run("pretrain", data_dir, root / "source", **options | PRETRAINING)]
    for strategy in STRATEGIES:
        source = "" if strategy == "NT" else root / "source"
        runs.append(tiny_run("finetune", data_dir, root / strategy, strategy, source, **options | {"seed": 4}))
    train_runs(0, 1, runs)
    return root


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains(trained, one_rank, strategy):
    source = read_checkpoint(manager.find(trained / "source"))
    first = read_checkpoint(trained / strategy / "initial")
    last = read_checkpoint(step_folder(trained / strategy, 3))
    assert torch.equal(last["table.item"], source["table.item"]) == strategy.endswith("_SF")
    tower = "dense.backbone.tower.blocks.0."
    assert any(name.startswith(tower) for name in last)
    for name, before in first.items():
        if name.startswith(tower):
            assert not torch.equal(last[name], before), name
    metrics = evaluate_checkpoint(trained / strategy, None, "test", one_rank)
    assert 0 < metrics["click"]["log_loss"] < 2


def test_the_tower_moves_with_full_transfer(trained, data_dir, tmp_path, one_rank):
    source = read_checkpoint(manager.find(trained / "source"))
    run = json.loads((manager.find(trained / "FT") / manager.STATE_NAME).read_text())["run_config"]
    options = OPTIONS | {"model": run["model"]}
    trainer = Trainer(tiny_run("finetune", data_dir, tmp_path, "FT", trained / "source", **options), one_rank)
    trainer.load_weights()
    loaded = {f"dense.{name}": value for name, value in trainer.components.weights()["dense"].items()}
    moved = [name for name in loaded if name.startswith("dense.backbone.")]
    assert {"dense.backbone.tower.positions.table.weight", "dense.backbone.project_in.layers.1.weight"} <= set(moved)
    assert all(torch.equal(loaded[name], source[name]) for name in moved)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_without_valid_rows_the_last_step_counts(tmp_path, one_rank, stage):
    """As published: training goes on to the test event, and nothing is left to choose by."""
    write_tiny_data(tmp_path / "data", rows={"valid": 0})
    run = tiny_run(stage, tmp_path / "data", tmp_path / "run", train={"max_steps": 6, "eval_per_epoch": 3})
    assert Trainer(run, one_rank).train() == {}
    assert manager.find(tmp_path / "run") == step_folder(tmp_path / "run", 6)
    assert evaluate_checkpoint(tmp_path / "run", None, "test", one_rank)
    for options in ({"patience": 2}, {"best_metric": "next_item/hr@10"}):
        with pytest.raises(ValueError, match=r"need a valid split, and that of .* has no rows"):
            Trainer(tiny_run(stage, tmp_path / "data", tmp_path / "other", train=options), one_rank)


def test_a_second_run_with_the_same_seed_is_the_same(data_dir, tmp_path, one_rank):
    """Bit for bit: dropout, own negatives, padded rows."""
    options = OPTIONS | PRETRAINING | {"model": MODELS["hstu"]}
    train_runs(0, 1, [tiny_run("pretrain", data_dir, tmp_path / name, **options) for name in ("a", "b")])
    first, second = (read_checkpoint(step_folder(tmp_path / name, 3)) for name in ("a", "b"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
