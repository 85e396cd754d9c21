"""The training loop on one rank: accumulation, early stopping, saving, and errors that stop it."""

import itertools
import json
import math
import re
import signal

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpsd_dist import trainer as trainer_module
from gpsd_dist.checkpoint import manager
from gpsd_dist.config import OptimizerConfig
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import (
    GLOBAL_BATCH_ROWS,
    NUM_ITEMS,
    NUM_TAGS,
    STEPS_PER_EPOCH,
    differing,
    fixed_negatives,
    read_checkpoint,
    rounding,
    step_folder,
    tiny_run,
    train_losses,
    write_tiny_data,
)


def _train(data_dir, output_dir, runtime, stage="finetune", **changes) -> Trainer:
    trainer = Trainer(tiny_run(stage, data_dir, output_dir, **changes), runtime)
    trainer.train()
    return trainer


@pytest.mark.equivalence
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_gradient_accumulation_gives_the_same_update(data_dir, tmp_path, one_rank, stage):
    final = []
    for parts in (1, 3):
        with fixed_negatives():
            _train(
                data_dir,
                tmp_path / str(parts),
                one_rank,
                stage,
                train={"micro_batches": parts, "max_steps": 2},
                pretrain={"num_negative_groups": 1},
                dense=OptimizerConfig("adamw", 1e-2, weight_decay=0.1, eps=1e-4),
            )
        final.append(read_checkpoint(step_folder(tmp_path / str(parts), 2)))
    assert not differing(*final, rtol=rounding(2))
    assert train_losses(tmp_path / "3") == pytest.approx(train_losses(tmp_path / "1"), rel=1e-5)


@pytest.mark.equivalence
def test_more_parts_than_requests_still_train(data_dir, tmp_path, one_rank):
    """The last batch of an epoch has 6 requests; some of 7 parts are empty."""
    for parts in (1, 7):
        _train(data_dir, tmp_path / str(parts), one_rank, train={"micro_batches": parts, "max_steps": STEPS_PER_EPOCH})
    assert train_losses(tmp_path / "7") == pytest.approx(train_losses(tmp_path / "1"), rel=1e-4)


def test_steps_learning_rate_and_length_follow_the_options(data_dir, tmp_path, one_rank):
    trainer = _train(data_dir, tmp_path, one_rank, train={"epochs": 2, "warmup_fraction": 0.25})
    assert trainer.schedule_steps == trainer.step == 2 * STEPS_PER_EPOCH
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [entry["train/dense_lr"] for entry in entries if "train/dense_lr" in entry]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])  # 3 warm-up steps
    assert all(a > b for a, b in itertools.pairwise(rates[3:])) and rates[-1] > 1e-3


def _with_metrics(monkeypatch, values, key="auc"):
    """Validation gives these values of click/`key`, one after the other."""
    left = iter(values)

    def metrics(*args):
        values = {"auc": 0.5, "log_loss": 0.5} | {key: next(left)}
        return {"click": values, "buy": values}

    monkeypatch.setattr(trainer_module, "evaluate_split", metrics)


def _checkpoint_steps(output_dir) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (output_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(("patience", "stop"), [(1, 3), (2, 6), (0, 8)])
def test_early_stopping_counts_stale_validations(data_dir, tmp_path, one_rank, monkeypatch, patience, stop):
    _with_metrics(monkeypatch, [0.5, 0.6, 0.6, 0.7, 0.1, 0.2, 0.9, 0.3, 0.3])
    train = {"patience": patience, "eval_per_epoch": 6, "max_steps": 8, "keep_last": 2}
    trainer = _train(data_dir, tmp_path, one_rank, train=train)
    assert trainer.step == stop
    best = {1: 2, 2: 4, 0: 7}[patience]
    assert manager.best_step(tmp_path / "checkpoints") == best
    saved = json.loads((tmp_path / "checkpoints/best.json").read_text())["metrics"]
    assert saved["click/auc"] == max([0.5, 0.6, 0.6, 0.7, 0.1, 0.2, 0.9, 0.3][:stop])
    assert manager.find(tmp_path) == step_folder(tmp_path, best)
    assert manager.find(tmp_path, "last") == step_folder(tmp_path, stop)
    assert _checkpoint_steps(tmp_path) == sorted({best, stop - 1, stop})


def test_validations_in_the_warmup_use_up_no_patience(data_dir, tmp_path, one_rank, monkeypatch):
    """4 of 12 steps are warm-up: their three worse looks do not count, the two after them do."""
    _with_metrics(monkeypatch, [0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.7])
    train = {"patience": 2, "eval_per_epoch": 6, "epochs": 2, "warmup_fraction": 0.34}
    trainer = _train(data_dir, tmp_path, one_rank, train=train)
    assert (trainer.warmup_steps, trainer.step, trainer.early_stopping.best_step) == (4, 6, 1)


def test_undefined_metric_is_never_the_best_for_good(data_dir, tmp_path, one_rank, monkeypatch):
    """AUC is NaN where all labels are alike; a number that comes later is better."""
    _with_metrics(monkeypatch, [math.nan, 0.6, math.nan, 0.5])
    _train(data_dir, tmp_path, one_rank, train={"eval_per_epoch": 6, "max_steps": 4})
    assert manager.best_step(tmp_path / "checkpoints") == 2


def test_best_metric_can_be_chosen(data_dir, tmp_path, one_rank):
    _train(data_dir, tmp_path, one_rank, train={"best_metric": "buy/gauc", "max_steps": 2, "eval_per_epoch": 6})
    wrong = tiny_run("finetune", data_dir, tmp_path / "b", train={"best_metric": "buy/guac"})
    with pytest.raises(ValueError, match=r"best_metric 'buy/guac' is not one of .*; did you mean 'buy/gauc'"):
        Trainer(wrong, one_rank)  # before a step is trained
    wrong = tiny_run("pretrain", data_dir, tmp_path / "b", train={"best_metric": "next_item/hr@11"})
    with pytest.raises(ValueError, match=r"next_item/hr@11' is not one of .*did you mean 'next_item/hr@1"):
        Trainer(wrong, one_rank)


@pytest.mark.parametrize("key", ["log_loss", "ne"])
def test_a_smaller_loss_is_better(data_dir, tmp_path, one_rank, monkeypatch, key):
    """The largest loss would choose the worst checkpoint, and use up patience while the model gets better."""
    _with_metrics(monkeypatch, [0.7, 0.6, 0.5, 0.8, 0.9], key)
    train = {"best_metric": f"click/{key}", "eval_per_epoch": 6, "patience": 2, "warmup_fraction": 0.0}
    assert _train(data_dir, tmp_path, one_rank, train=train).step == 5
    assert manager.best_step(tmp_path / "checkpoints") == 3


def test_saves_at_the_interval_and_keeps_best_and_last(data_dir, tmp_path, one_rank):
    train = {"save_interval_steps": 2, "max_steps": 11, "keep_last": 2}
    _train(data_dir, tmp_path, one_rank, train=train)
    best = manager.best_step(tmp_path / "checkpoints")
    assert best in (6, 11) and _checkpoint_steps(tmp_path) == sorted({best, 10, 11})
    assert manager.read_state(step_folder(tmp_path, 10)).metrics == {}
    assert "click/auc" in manager.read_state(step_folder(tmp_path, 11)).metrics


def test_without_valid_rows_every_epoch_is_saved(tmp_path, one_rank):
    """So that a crash loses an epoch at most, though no validation saves."""
    write_tiny_data(tmp_path / "data", rows={"valid": 0})
    Trainer(tiny_run("finetune", tmp_path / "data", tmp_path / "run", train={"epochs": 3}), one_rank).train()
    assert _checkpoint_steps(tmp_path / "run") == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH]
    assert manager.best_step(tmp_path / "run" / "checkpoints") == 3 * STEPS_PER_EPOCH


def test_sigterm_during_any_step_saves_that_step(data_dir, tmp_path, one_rank, monkeypatch):
    """Also where the step is one of the validation, or the signal comes late in the step."""
    for stop_at, method in ((3, "record_step"), (STEPS_PER_EPOCH, "validate"), (4, "_check_finite")):
        trainer = Trainer(tiny_run("finetune", data_dir, tmp_path / method), one_rank)
        owners = {"record_step": trainer.metrics, "validate": trainer, "_check_finite": trainer.training_step}
        owner = owners[method]
        original = getattr(owner, method)

        def stopping(*args, trainer=trainer, original=original, stop_at=stop_at):
            if trainer.step >= stop_at:
                signal.raise_signal(signal.SIGTERM)
            return original(*args)

        monkeypatch.setattr(owner, method, stopping)
        trainer.train()
        assert manager.find(tmp_path / method, "last") == step_folder(tmp_path / method, trainer.step)
        assert trainer.step in (stop_at, stop_at + 1)


def poison(trainer: Trainer, at_step: int) -> None:
    """The click head gives NaN from that step on."""
    original = trainer.training_step.zero_grad

    def poisoned():
        if trainer.step == at_step:
            with torch.no_grad():
                trainer.model.heads.mlps["click"][2].bias.fill_(math.nan)
        original()

    trainer.training_step.zero_grad = poisoned


def test_loss_that_is_not_finite_stops_before_weights_move(data_dir, tmp_path, one_rank):
    trainer = Trainer(tiny_run("finetune", data_dir, tmp_path, train={"save_interval_steps": 2}), one_rank)
    poison(trainer, at_step=3)
    with pytest.raises(ValueError, match="rank 0, step 3: the loss is not finite") as error:
        trainer.train()
    assert f"last good checkpoint: {step_folder(tmp_path, 2)}" in str(error.value)
    assert re.search(r"'click': nan, 'buy': \d", str(error.value))
    tables = {name: value.local_shards()[0].tensor for name, value in trainer.components.weights()["table"].items()}
    assert all(torch.isfinite(table).all() for table in tables.values())


def test_spoilt_weights_are_not_saved_where_the_step_did_not_look(data_dir, tmp_path, one_rank):
    """On a GPU the losses of most steps are not looked at."""
    trainer = Trainer(tiny_run("finetune", data_dir, tmp_path, train={"save_interval_steps": 2}), one_rank)
    poison(trainer, at_step=2)
    step = trainer.training_step
    step._check_finite = lambda done: None
    with pytest.raises(ValueError, match="rank 0, step 3: the loss is not finite"):
        trainer.train()
    assert trainer.step == 4 and manager.find(tmp_path, "last") == step_folder(tmp_path, 2)


@pytest.mark.parametrize("index", [NUM_ITEMS, -1, 2**40])
def test_index_outside_a_table_is_an_error_not_row_0(data_dir, tmp_path, one_rank, index):
    """Collate checks indices; this is the net below it."""
    tables = Trainer(tiny_run("finetune", data_dir, tmp_path), one_rank).components.tables

    def rows(item: int):
        lookup = KeyedJaggedTensor(
            keys=["item", "tag"], values=torch.tensor([2, item, NUM_TAGS - 1]), lengths=torch.tensor([2, 1])
        )
        return tables(lookup)["item"]

    assert rows(NUM_ITEMS - 1).shape == (2, 16)
    with pytest.raises(RuntimeError):
        rows(index)


def test_options_left_to_the_data_are_numbers_of_the_run_from_then_on(data_dir, tmp_path, one_rank):
    """The first run was given its batch and epochs; resumed with 'auto', it goes on in them, and not in 16 and 16."""
    left = {
        "data": {"global_batch_rows": "auto"},
        "train": {"epochs": "auto", "warmup_fraction": "auto", "max_steps": 2},
    }
    chosen = Trainer(tiny_run("finetune", data_dir, tmp_path / "new", **left), one_rank)
    assert (chosen.run.data.global_batch_rows, chosen.run.train.epochs) == (16, 16)
    _train(data_dir, tmp_path / "run", one_rank, train={"max_steps": 1})
    resumed = _train(data_dir, tmp_path / "run", one_rank, **left)
    assert (resumed.run.data.global_batch_rows, resumed.run.train.epochs, resumed.step) == (GLOBAL_BATCH_ROWS, 3, 2)
