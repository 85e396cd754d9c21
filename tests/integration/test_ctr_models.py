"""The discriminative models in whole runs: every configuration file trains, tables of a Transformer transfer and
freeze, and the number of ranks does not matter.

Losses of 1 against 2 ranks: tolerances as in test_sharding.py.
"""

import pathlib
import re

import pytest
import torch

from gpsd_dist.checkpoint import manager
from gpsd_dist.config import OptimizerConfig
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import (
    differing,
    read_checkpoint,
    rounding,
    step_folder,
    tiny_run,
    train_losses,
    train_runs,
    write_tiny_data,
)

pytestmark = pytest.mark.timeout(420)  # the fixture starts ranks

NAMES = ("deepfm", "din", "dien", "dmin", "wukong")
ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 4
# A history's ten items pass through DIEN's recurrence one after the other, and each adds rounding as a step does.
# Largest relative error of a first gradient seen with default | avx2 | avx512: 3.1e-6 | 1.8e-6 | 9.6e-7, of 3.8e-5.
RTOL = rounding(10)
# Dice standardises what the bias before it is added to, so terms 1,000 times as large cancel in that bias's gradient.
# Largest seen: 3.5e-3 | 1.3e-3 | 1.3e-3.
CANCELLED = re.compile(r"attentions?\.(\d\.)?linears\.[01]\.bias\.exp_avg$")
CANCELLED_RTOL = 0.05


@pytest.fixture(scope="module")
def source(tmp_path_factory, data_dir, one_rank):
    """A Transformer's pretraining."""
    folder = tmp_path_factory.mktemp("source")
    train_runs(0, 1, [tiny_run("pretrain", data_dir, folder, train={"max_steps": 4})])
    return folder


def leaf_run(name: str, data_dir, output_dir, strategy: str, source):
    """As the command line with the model's file would make it, but for the sizes of the tiny data."""
    files = (ROOT / "configs/stage/finetune.gin", ROOT / f"configs/model/{name}.gin")
    init = [] if strategy == "NT" else [f"--gin.INIT_CHECKPOINT={source}"]
    overrides = {
        "DATA_DIR": data_dir,
        "OUTPUT_DIR": output_dir,
        "STRATEGY": strategy,
        "SEED": 7,
        "MAX_HISTORY_LENGTH": 10,
        "GLOBAL_BATCH_ROWS": 8,
        "EMBEDDING_DIM": 16,
        "TablesConfig.small_table_max_rows": 20,
        "DataConfig.num_data_shards": 2,
        "TrainConfig.max_steps": 2,
        "TrainConfig.log_interval_steps": 1,
    }
    arguments = [argument for file in files for argument in ("--gin_file", str(file))]
    return load_run_config([*arguments, *(f"--gin.{key}={value}" for key, value in overrides.items()), *init]).run


@pytest.mark.parametrize("strategy", ["NT", "ST", "ST_SF"])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains_and_takes_the_table_of_a_transformer(name, strategy, source, data_dir, tmp_path, one_rank):
    trainer = Trainer(leaf_run(name, data_dir, tmp_path, strategy, source), one_rank)
    pretrained = read_checkpoint(manager.find(source))["table.item"]
    table = trainer.components.weights()["table"]["item"].local_shards()[0].tensor
    random = table.clone()
    trainer.load_weights()
    assert torch.equal(table, random if strategy == "NT" else pretrained) and not torch.equal(random, pretrained)
    before = {key: value.clone() for key, value in trainer.components.weights()["dense"].items()}
    metrics = trainer.train()
    assert list(train_losses(tmp_path)) == [1, 2] and 0 <= metrics["click/auc"] <= 1
    after = read_checkpoint(step_folder(tmp_path, 2))
    assert torch.equal(after["table.item"], pretrained) == (strategy == "ST_SF")
    assert ("table_optimizer.item.momentum1" in after) == (strategy != "ST_SF")
    unmoved = [key for key, value in before.items() if torch.equal(after[f"dense.{key}"], value)]
    # gradients of Dice's slope start near 1e-8, so two steps may be lost in the rounding of a slope of 1
    assert not [key for key in unmoved if key.startswith("backbone.tower") and not key.endswith(".slope")], unmoved


@pytest.mark.parametrize("strategy", ["FT", "FT_SF"])
@pytest.mark.parametrize("name", NAMES)
def test_full_transfer_from_another_model_is_refused(name, strategy, source, data_dir, tmp_path, one_rank):
    run = tiny_run("finetune", data_dir, tmp_path, strategy, source, model={"name": name})
    with pytest.raises(ValueError, match=f"a 'transformer' and this run a '{name}'.*STRATEGY ST or ST_SF"):
        Trainer(run, one_rank).train()


@pytest.mark.parametrize("name", NAMES)
def test_pretraining_is_refused(name, data_dir, tmp_path, one_rank):
    with pytest.raises(ValueError, match=f"model '{name}' predicts no next item; pretrain one of .*'transformer'"):
        Trainer(tiny_run("pretrain", data_dir, tmp_path, model={"name": name}), one_rank)


@pytest.mark.parametrize("name", ["transformer", "deepfm", "din", "wukong"])
def test_auxiliary_loss_is_refused_where_histories_have_no_states(name, data_dir, tmp_path, one_rank):
    run = tiny_run("finetune", data_dir, tmp_path, model={"name": name}, finetune={"next_behaviour_weight": 0.5})
    with pytest.raises(ValueError, match=rf"model '{name}' has no history states.*\['dien', 'dmin'\]"):
        Trainer(run, one_rank)


def _loss_lines(output_dir, key):
    return [line for line in (output_dir / "metrics.jsonl").read_text().splitlines() if f'"{key}"' in line]


@pytest.mark.parametrize("name", ["dien", "dmin"])
def test_auxiliary_loss_trains_along_and_is_a_function_of_the_seed(name, data_dir, tmp_path, one_rank):
    losses = {}
    for folder, weight in (("without", 0.0), ("with", 1.0), ("again", 1.0)):
        changes = {"model": {"name": name}, "finetune": {"next_behaviour_weight": weight}, "train": {"max_steps": 4}}
        Trainer(tiny_run("finetune", data_dir, tmp_path / folder, **changes), one_rank).train()
        losses[folder] = train_losses(tmp_path / folder)
        assert len(_loss_lines(tmp_path / folder, "train/next_behaviour_loss")) == (4 if weight else 0)
        assert _loss_lines(tmp_path / folder, "gap/click_log_loss")
    assert losses["with"] == losses["again"]
    assert all(losses["with"][step] > losses["without"][step] for step in losses["with"])


# --- sharded = unsharded --------------------------------------------------------------------------------------------


def _runs(data_dir, single_row_dir, folder):
    changes = {
        "dense": OptimizerConfig("adamw", 1e-2, weight_decay=0.1, eps=1e-4),
        "train": {"max_steps": STEPS, "save_interval_steps": 1, "keep_last": 100},
    }
    auxiliary = {"finetune": {"next_behaviour_weight": 0.5}}
    runs = []
    for name in NAMES:
        model = {"model": {"name": name, "max_positions": 10}}
        runs.append(tiny_run("finetune", data_dir, folder / name, **changes, **model))
        runs.append(tiny_run("finetune", single_row_dir, folder / f"{name}_single_row", **changes, **model))
    model = {"model": {"name": "dien"}}
    runs.append(tiny_run("finetune", data_dir, folder / "dien_auxiliary", **changes, **model, **auxiliary))
    return runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, one_rank):
    """Folders of the same runs on 1 rank and on 2."""
    one, two, single_row_dir = (tmp_path_factory.mktemp(name) for name in ("one", "two", "single_row"))
    write_tiny_data(single_row_dir, rows={"pretrain": 1, "train": 1, "valid": 1})
    train_runs(0, 1, _runs(data_dir, single_row_dir, one))
    run_distributed(train_runs, 2, two, _runs(data_dir, single_row_dir, two), timeout_s=300)
    return one, two


@pytest.mark.equivalence
@pytest.mark.parametrize("name", NAMES)
def test_training_does_not_depend_on_world_size(trained, name):
    one, two = (folder / name for folder in trained)
    assert not differing(read_checkpoint(one / "initial"), read_checkpoint(two / "initial"))
    sides = [read_checkpoint(step_folder(folder, 1)) for folder in (one, two)]
    names = {key for key in sides[0] if key.endswith("exp_avg") or "table" in key}  # gradients, and tables after a step
    assert any("backbone.tower" in key for key in names) or name == "deepfm"
    cancelled = {key for key in names if CANCELLED.search(key)}
    for part, rtol in ((names - cancelled, RTOL), (cancelled, CANCELLED_RTOL)):
        ours, theirs = ({key: side[key] for key in part} for side in sides)
        assert not differing(ours, theirs, rtol=rtol)
        too_large = {key: value * (1 + 3 * rtol) for key, value in ours.items() if value.any()}
        assert set(differing(ours, ours | too_large, rtol=rtol)) == set(too_large), "a planted fault is not found"
    losses, losses_two = train_losses(one), train_losses(two)
    assert list(losses) == list(range(1, STEPS + 1)) and losses_two == pytest.approx(losses, rel=1e-4)


@pytest.mark.equivalence
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_rows_takes_part(trained, name):
    one, two = (train_losses(folder / f"{name}_single_row") for folder in trained)
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-4)  # three epochs of one step


def test_auxiliary_loss_trains_on_two_ranks(trained):
    """Ranks draw their own negatives, so only the supervised part could agree; it does until the first update."""
    first = [_loss_lines(folder / "dien_auxiliary", "train/click_loss")[0] for folder in trained]
    click = [float(line.split('"train/click_loss": ')[1].split(",")[0].rstrip("}")) for line in first]
    assert click[1] == pytest.approx(click[0], rel=1e-5)
    assert len(train_losses(trained[1] / "dien_auxiliary")) == STEPS
