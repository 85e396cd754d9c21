"""A refit trains on train + valid as long as the run that it repeats took to its best validation."""

import dataclasses
import signal

import pytest

from gpsd_dist.checkpoint import manager
from gpsd_dist.checkpoint.resume import epochs_done
from gpsd_dist.schema import read_manifest
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import tiny_run

EPOCHS = 3


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, data_dir, one_rank):
    """A finished run with three validations per epoch."""
    folder = tmp_path_factory.mktemp("refit") / "tuned"
    run = tiny_run("finetune", data_dir, folder, train={"epochs": EPOCHS, "eval_per_epoch": 3})
    Trainer(run, one_rank).train()
    return run


def refit(tuned, output_dir, **changes):
    return dataclasses.replace(tuned, output_dir=str(output_dir), refit_of=tuned.output_dir, **changes)


def test_a_refit_reads_both_splits_and_stops_where_the_other_run_was_best(tuned, tmp_path, one_rank):
    manifest = read_manifest(tuned.data_dir)
    rows = {split.name: split.num_rows for split in manifest.splits}
    batch = tuned.data.global_batch_rows
    trainer = Trainer(refit(tuned, tmp_path, seed=5), one_rank)
    assert trainer.loader.num_rows == rows["train"] + rows["valid"]
    epochs = manager.best_step(manager.find(tuned.output_dir).parent) / -(-rows["train"] // batch)
    assert trainer.total_steps == round(epochs * -(-(rows["train"] + rows["valid"]) // batch))
    assert trainer.schedule_steps == EPOCHS * trainer.loader.steps_per_epoch
    trainer.train()
    result = manager.find(tmp_path)
    state = manager.read_state(result)
    assert (state.step, state.metrics, result) == (trainer.total_steps, {}, manager.find(tmp_path, "last"))
    assert not [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "valid/" in line]
    assert Trainer(refit(tuned, tmp_path, seed=5), one_rank).train() == {}  # finished: nothing is trained again


def test_a_refit_of_other_options_is_refused(tuned, tmp_path, one_rank):
    other = dataclasses.replace(tuned.train, epochs=EPOCHS + 1)
    with pytest.raises(ValueError, match=r"train\.epochs: 3 there, 4 now"):
        Trainer(refit(tuned, tmp_path, train=other), one_rank)


def test_a_refit_of_an_unfinished_run_is_refused(tuned, tmp_path, one_rank):
    short = dataclasses.replace(tuned, output_dir=str(tmp_path / "short"))
    trainer = Trainer(short, one_rank)
    trainer.stops.note(signal.SIGTERM)  # comes in the first step
    trainer.train()
    with pytest.raises(ValueError, match="is not finished"):
        Trainer(dataclasses.replace(refit(tuned, tmp_path / "out"), refit_of=short.output_dir), one_rank)


def test_epochs_of_batches_in_tokens_count_what_the_model_saw(data_dir, tmp_path, one_rank):
    """Histories of up to 12 tokens, of which 4 are kept."""
    data = {"max_history_length": 4, "global_batch_rows": 0, "global_batch_tokens": 20}
    run = tiny_run("finetune", data_dir, tmp_path, data=data, train={"max_steps": 2})
    trainer = Trainer(run, one_rank)
    trainer.train()
    stored = read_manifest(data_dir).split("train").num_history_tokens
    assert trainer.loader.steps_per_epoch < stored // 20
    assert epochs_done(manager.read_state(manager.find(tmp_path, "last"))) == 2 / trainer.loader.steps_per_epoch
