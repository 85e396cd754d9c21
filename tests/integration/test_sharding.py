"""Sharded = unsharded: 1 and 2 ranks with the same global batches give the same run, for every kind of plan.

Tolerances: sums over a batch are split differently over ranks, so float32 results agree up to `rounding`.
Dense eps is 1e-4 here: Adam divides by the gradient's own size, so with 1e-8 rounding of a near-zero gradient would be
amplified to a full step.
"""

import pathlib

import pytest
import torch

from gpsd_dist import schema
from gpsd_dist.batch.lookup import lookup_of
from gpsd_dist.config import OptimizerConfig, TablesConfig
from gpsd_dist.tables.collections import Tables
from gpsd_dist.tables.sharding import shard_tables
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import (
    NUM_ITEMS,
    SHARDED_TABLES,
    differing,
    fixed_negatives,
    read_checkpoint,
    rounding,
    step_folder,
    tiny_run,
    train_losses,
    train_runs,
    write_tiny_data,
)

# The fixture starts ranks, each call with its own limit of 150 s.
pytestmark = [pytest.mark.equivalence, pytest.mark.timeout(420)]

STEPS = 8  # an epoch has 6
PLANS = {
    "row_wise": {},
    "table_wise": {"item": "table_wise", "tag": "table_wise"},
    "column_wise": {"item": "column_wise", "tag": "column_wise"},
    "mixed": {"item": "column_wise", "tag": "row_wise"},
}
EMBEDDING_DIM = 256  # TorchRec's planner cuts columns into pieces of 128 at least


# Rows of 254 are stored with 256 columns: the padding lies in the second of two column shards.
PADDED = {"item": "column_wise", "tag": "row_wise"}
GENERATIVE = {"name": "hstu", "max_positions": 11}


def _run(stage: str, data_dir, output_dir, sharding=None, *, width=EMBEDDING_DIM, model=None, per="group", **train):
    return tiny_run(
        stage,
        data_dir,
        output_dir,
        tables={"sharding": sharding or {}, "embedding_dim": width},
        model=model or {},
        pretrain={"num_negative_groups": 1, "negatives_per": per},
        dense=OptimizerConfig("adamw", 1e-2, weight_decay=0.1, eps=1e-4),
        train={"max_steps": STEPS, "save_interval_steps": 1, "keep_last": 100} | train,
    )


def _train_with_fixed_negatives(rank: int, world_size: int, runs):
    with fixed_negatives():
        return train_runs(rank, world_size, runs)


STAGES = ("pretrain", "finetune")


def _runs(data_dir, single_row_dir, folder):
    finetune = [_run("finetune", data_dir, folder / name, sharding) for name, sharding in PLANS.items()]
    single = [_run(stage, single_row_dir, folder / f"single_row_{stage}", max_steps=2) for stage in STAGES]
    hstu = _run("pretrain", data_dir, folder / "hstu", PADDED, width=254, model=GENERATIVE, per="position")
    return [*finetune, _run("pretrain", data_dir, folder / "pretrain"), hstu, *single]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, one_rank):
    """Run name -> (folder of the 1-rank run, folder of the 2-rank run, plan on 2 ranks)."""
    one, two, single_row_dir = (tmp_path_factory.mktemp(name) for name in ("one", "two", "single_row"))
    write_tiny_data(single_row_dir, rows={"pretrain": 1, "train": 1, "valid": 1})
    _train_with_fixed_negatives(0, 1, _runs(data_dir, single_row_dir, one))
    runs = _runs(data_dir, single_row_dir, two)
    plans = run_distributed(_train_with_fixed_negatives, 2, two, runs, timeout_s=300)[0]
    names = [pathlib.Path(run.output_dir).name for run in runs]
    return {name: (one / name, two / name, plan) for name, plan in zip(names, plans)}


@pytest.mark.parametrize("name", [*PLANS, "pretrain"])
def test_initial_weights_do_not_depend_on_world_size_or_plan(trained, name):
    reference = read_checkpoint(trained["pretrain" if name == "pretrain" else "row_wise"][0] / "initial")
    one, two, _ = trained[name]
    assert not differing(read_checkpoint(one / "initial"), reference)
    assert not differing(read_checkpoint(two / "initial"), reference)


def test_padding_is_zero_before_and_after_training(trained):
    for folder in trained["hstu"][:2]:
        first, last = read_checkpoint(folder / "initial"), read_checkpoint(step_folder(folder, STEPS))
        for table in ("table.item", "table.tag"):
            assert first[table].shape[1] == 256 and first[table][:, :254].std() > 0.01
            assert (first[table][:, 254:] == 0).all() and (last[table][:, 254:] == 0).all()
            assert not torch.equal(first[table], last[table])


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
@pytest.mark.parametrize("width", [1, 14, 16])
def test_padding_does_not_change_the_step(one_rank, optimizer, width):
    """First step of Adagrad, from the state 0: the gradient over the root of its mean square over the own width."""
    options = TablesConfig(embedding_dim=width)
    tables = Tables((schema.Table("item", NUM_ITEMS, "x"),), (), options, torch.device("meta"))
    sharded = shard_tables(tables, options, OptimizerConfig(optimizer, 0.1), one_rank, seed=0)
    sharded.set_learning_rate(0.1)
    before = sharded.weights()["item"].local_shards()[0].tensor.clone()
    rows = sharded(lookup_of(("item",), torch.tensor([5, 7]), [2]))["item"]
    assert torch.equal(rows, before[[5, 7], :width])
    gradient = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(rows, gradient)
    square = gradient.pow(2)
    moment = square.mean(-1, keepdim=True) if optimizer == "rowwise_adagrad" else square
    expected = before.clone()
    expected[[5, 7], :width] -= 0.1 * gradient / moment.sqrt()
    torch.testing.assert_close(sharded.weights()["item"].local_shards()[0].tensor, expected, rtol=1e-5, atol=1e-6)


def test_both_stages_begin_with_the_same_tables(trained):
    pretrained, finetuned = (read_checkpoint(trained[name][0] / "initial") for name in ("pretrain", "row_wise"))
    for table in ("table.item", "table.tag"):
        assert torch.equal(pretrained[table], finetuned[table])
        assert 0.018 < float(pretrained[table].std()) < 0.022
    assert len(pretrained["table.item"].unique(dim=0)) == NUM_ITEMS


def test_tables_are_laid_out_as_asked(trained):
    row = next(line for line in trained["row_wise"][2].splitlines() if line.startswith("table item"))
    assert "row_wise" in row and "31 x 256 on rank 0; 30 x 256 on rank 1" in row
    column = next(line for line in trained["column_wise"][2].splitlines() if line.startswith("table item"))
    assert "column_wise" in column and "61 x 128 on ranks 0-1" in column
    assert "table tag: trainable, table_wise: 37 x 256 on rank " in trained["table_wise"][2]
    assert "table item: trainable, column_wise" in trained["mixed"][2]
    assert "table tag: trainable, row_wise" in trained["mixed"][2]


@pytest.mark.parametrize("name", [*PLANS, "pretrain", "hstu"])
def test_one_step_gives_the_same_gradients_and_tables(trained, name):
    one, two = (read_checkpoint(step_folder(folder, 1)) for folder in trained[name][:2])
    # exp_avg of the first step is (1 - beta1) times the gradient
    gradients = [{k: v for k, v in side.items() if k.endswith("exp_avg")} for side in (one, two)]
    assert any(float(value.abs().max()) > 1e-3 for value in gradients[0].values())
    assert not differing(*gradients, rtol=rounding(1))
    tables = [{k: v for k, v in side.items() if k.startswith("table.")} for side in (one, two)]
    assert not differing(*tables, rtol=rounding(1))
    states = [{k: v for k, v in side.items() if k.startswith("table_optimizer.")} for side in (one, two)]
    assert set(states[0]) == {f"table_optimizer.{table}.momentum1" for table in SHARDED_TABLES}
    assert not differing(*states, rtol=rounding(1))


@pytest.mark.parametrize("name", [*PLANS, "pretrain", "hstu"])
def test_training_does_not_depend_on_world_size(trained, name):
    one, two, _ = trained[name]
    losses, losses_two = train_losses(one), train_losses(two)
    assert list(losses) == list(losses_two) == list(range(1, STEPS + 1))
    assert losses_two == pytest.approx(losses, rel=1e-4)
    first, last = read_checkpoint(one / "initial"), read_checkpoint(step_folder(one, STEPS))
    assert float((first["table.item"] - last["table.item"]).abs().max()) > 0.05  # there was something to compare
    assert not differing(last, read_checkpoint(step_folder(two, STEPS)), rtol=rounding(STEPS))


_TOWER = "dense_optimizer.backbone.tower"
PLANTED = {  # what a fault changes -> the tensor that shows it, and how
    "a gradient is a thousandth too large": (f"{_TOWER}.blocks.0.qkv.weight.exp_avg", lambda x: x * 1.001),
    "a bias has no gradient": ("dense_optimizer.heads.mlps.click.2.bias.exp_avg", torch.zeros_like),
    "the last row of a table is another row": ("table.item", lambda x: torch.cat((x[:-1], x[:1]))),
    "a row moves by a thousandth of the largest": ("table.item", lambda x: x + 1e-3 * x.abs().max() * _only(3, x)),
    "a row's momentum counts a step twice": (
        "table_optimizer.item.momentum1",
        lambda x: x + x.max() / STEPS * _only(int(x.argmax()), x),
    ),
}


def _only(row: int, like: torch.Tensor) -> torch.Tensor:
    """1 in one row, 0 in all others."""
    is_row = torch.arange(len(like)) == row
    return is_row.float().reshape(-1, *[1] * (like.dim() - 1))


@pytest.mark.parametrize("step", [1, STEPS])
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_exceed_the_tolerance(trained, fault, step):
    sound = read_checkpoint(step_folder(trained["row_wise"][0], step))
    name, change = PLANTED[fault]
    assert set(differing(sound, sound | {name: change(sound[name])}, rtol=rounding(step))) == {name}


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_rows_takes_part(trained, stage):
    """The split has one row: one of the two ranks never has a request."""
    one, two = (train_losses(folder) for folder in trained[f"single_row_{stage}"][:2])
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-4)
