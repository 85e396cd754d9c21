"""A refit trains on train + valid as long as the run that it repeats took to its best validation."""

import dataclasses
import shutil
import signal

import pytest

from gpsd_dist.checkpoint import manager
from gpsd_dist.checkpoint.resume import epochs_done
from gpsd_dist.plan import __main__ as plan
from gpsd_dist.plan.output import make_scenario
from gpsd_dist.schema import read_manifest, write_manifest
from gpsd_dist.trainer import Trainer
from gpsd_dist.validation import AUTO
from tests.integration.tiny_data import edit_state, tiny_run

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


def test_the_plan_of_a_refit_takes_the_numbers_of_the_run_that_it_repeats(tuned, tmp_path):
    """The data alone would give batches of 16."""
    open_options = {"data": dataclasses.replace(tuned.data, global_batch_rows=AUTO)}
    open_options["train"] = dataclasses.replace(tuned.train, epochs=AUTO)
    args, _ = plan._parse(["--world_size", "2", "--hbm_gib", "80"])
    scenario = make_scenario(refit(tuned, tmp_path, **open_options), args)
    assert scenario.run == refit(tuned, tmp_path)
    batch = tuned.data.global_batch_rows
    assert scenario.shape.notes[-1] == f"of the run before: global_batch_rows {batch}, epochs {EPOCHS}" and batch != 16


def test_a_refit_of_other_options_is_refused(tuned, tmp_path, one_rank):
    other = dataclasses.replace(tuned.train, epochs=EPOCHS + 1)
    with pytest.raises(ValueError, match=r"train\.epochs: 3 there, 4 now"):
        Trainer(refit(tuned, tmp_path, train=other), one_rank)


def test_a_refit_of_a_run_whose_metric_was_never_a_number_is_refused(tuned, tmp_path, one_rank):
    shutil.copytree(tuned.output_dir, tmp_path / "nan")
    for folder in (tmp_path / "nan" / "checkpoints").glob("step_*"):
        edit_state(folder, lambda state: state["progress"].update(best_value=float("nan")))
    run = dataclasses.replace(tuned, output_dir=str(tmp_path / "refit"), refit_of=str(tmp_path / "nan"))
    with pytest.raises(ValueError, match="has no best validation"):
        Trainer(run, one_rank)


def test_a_refit_of_an_unfinished_run_is_refused(tuned, tmp_path, one_rank):
    short = dataclasses.replace(tuned, output_dir=str(tmp_path / "short"))
    trainer = Trainer(short, one_rank)
    trainer.stops.note(signal.SIGTERM)  # comes in the first step
    trainer.train()
    with pytest.raises(ValueError, match="is not finished"):
        Trainer(dataclasses.replace(refit(tuned, tmp_path / "out"), refit_of=short.output_dir), one_rank)


def test_a_run_that_starts_from_a_refit_is_warned_of_its_valid_split(tuned, tmp_path, one_rank, caplog):
    """The next day's build is not: there all of `valid` comes after what the refit has seen."""
    again = refit(tuned, tmp_path / "refit")
    Trainer(again, one_rank).train()
    changes = {"output_dir": str(tmp_path / "next"), "strategy": "ST"}
    later = tmp_path / "later"
    shutil.copytree(tuned.data_dir, later)
    manifest = read_manifest(later)
    end_s = max(split.time_to_s for split in manifest.splits if split.name in ("train", "valid"))
    splits = [
        dataclasses.replace(split, time_from_s=end_s + 1, time_to_s=end_s + 2) if split.name == "valid" else split
        for split in manifest.splits
    ]
    write_manifest(dataclasses.replace(manifest, splits=tuple(splits)), later)
    for source, data_dir, is_warned in (
        (again, tuned.data_dir, True), (again, later, False), (tuned, tuned.data_dir, False),
    ):  # fmt: skip
        caplog.clear()
        run = dataclasses.replace(tuned, **changes, init_checkpoint=source.output_dir, data_dir=str(data_dir))
        Trainer(run, one_rank).load_weights()
        assert caplog.text.count("was trained on train + valid") == is_warned
        assert not is_warned or (str(tmp_path / "refit") in caplog.text and changes["output_dir"] in caplog.text)
        assert not is_warned or f"REFIT_OF={tuned.output_dir}" in caplog.text


def test_epochs_of_batches_in_tokens_count_what_the_model_saw(data_dir, tmp_path, one_rank):
    """Histories of up to 12 tokens, of which 4 are kept."""
    data = {"max_history_length": 4, "global_batch_rows": 0, "global_batch_tokens": 20}
    run = tiny_run("finetune", data_dir, tmp_path, data=data, train={"max_steps": 2})
    trainer = Trainer(run, one_rank)
    trainer.train()
    stored = read_manifest(data_dir).split("train").num_history_tokens
    assert trainer.loader.steps_per_epoch < stored // 20
    assert epochs_done(manager.read_state(manager.find(tmp_path, "last"))) == 2 / trainer.loader.steps_per_epoch
