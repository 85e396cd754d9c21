"""With commands that take milliseconds in place of trainings: `python -c ...` that leaves what a training leaves."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time

import pytest

from gpsd_dist import commands
from gpsd_dist.config import RunConfig
from gpsd_dist.scaling import runs
from gpsd_dist.scaling.ladder import Rung, Training, Trial
from gpsd_dist.schema import read_manifest
from gpsd_dist.validation import AUTO
from tests.helpers.synthetic import write_dataset

STATE = """
import json, pathlib, sys
folder, finished, run, manifest = pathlib.Path(sys.argv[1]), sys.argv[2] == "True", *map(json.loads, sys.argv[3:5])
checkpoint = folder / "checkpoints/step_00000001"
checkpoint.mkdir(parents=True, exist_ok=True)
(folder / "run_config.json").write_text(json.dumps(run))
position = dict(epoch=0, step=1, order=dict(rows=1, global_batch=1))
state = dict(step=1, data_position=position, progress={"is_finished": finished}, metrics={}, run_config=run,
             manifest=manifest, world_size=1)
(checkpoint / "run_state.json").write_text(json.dumps(state))
with open(folder / "calls", "a") as calls:
    calls.write("trained\\n")
"""
SCORE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"


@pytest.fixture
def data_dir(tmp_path):
    write_dataset(tmp_path / "data", seed=0, num_rows={"pretrain": 8, "train": 8, "valid": 8, "test": 8})
    return tmp_path / "data"


@pytest.fixture
def trial(tmp_path, data_dir):
    manifest = json.dumps(dataclasses.asdict(read_manifest(data_dir)))

    def training(stage: str, name: str, finished=True, **options) -> Training:
        run = RunConfig(stage, str(data_dir), str(tmp_path / "out" / name), **options)
        arguments = (run.output_dir, str(finished), json.dumps(dataclasses.asdict(run)), manifest)
        return Training(run, ("-c", STATE, *arguments))

    def make(result='{"click": {"auc": 0.7}}', pretrain_finished=True, seed=0) -> Trial:
        pretraining = training("pretrain", "pretrain", pretrain_finished, seed=seed)
        start = pretraining.run.output_dir
        finetuning = training("finetune", "ft_sf", strategy="FT_SF", init_checkpoint=start, seed=seed)
        path = finetuning.folder / "test.json"
        return Trial(Rung(4, 64, 4), seed, pretraining, finetuning, ("-c", SCORE, str(path), result), path)

    return make


def run(trial: Trial) -> list[str]:
    """Checks and runs a trial; returns what it said."""
    said: list[str] = []
    runs.check_unchanged([trial])
    runs.run_trial(trial, said.append)
    return said


def num_trained(training: Training) -> int:
    return len((training.folder / "calls").read_text().splitlines())


def test_commands_run_once_in_order_and_are_shown(trial):
    first = run(trial())
    assert [line[:13] for line in first] == ["$ python -c '", "$ python -c '", "$ python -c '"[:13]]
    assert run(trial()) == [f"l4h64a4, seed 0: finished, {trial().result}"]
    assert num_trained(trial().pretraining) == num_trained(trial().finetuning) == 1


def test_only_what_is_missing_is_run(trial):
    run(trial())
    trial().result.unlink()
    said = run(trial())
    assert "pretrain is finished" in said[0] and "finetune is finished" in said[1] and said[2].startswith("$ ")
    trial().result.write_text('{"click": {"au')  # killed while it wrote
    assert len(run(trial())) == 3 and json.loads(trial().result.read_text())
    assert num_trained(trial().finetuning) == 1


def test_half_trained_run_is_handed_to_the_trainer_again(trial):
    with pytest.raises(runs.Stopped, match="pretrain ended before its last step"):
        run(trial(pretrain_finished=False))
    assert not trial().finetuning.folder.exists()
    run(trial())
    assert num_trained(trial().pretraining) == 2


@pytest.mark.parametrize("has_result", [True, False])
def test_run_with_other_options_stops_everything_and_says_what_differs(trial, has_result):
    run(trial())
    if not has_result:
        trial().result.unlink()
    other = trial()
    changed = dataclasses.replace(other.finetuning.run.train, epochs=11)
    finetuning = dataclasses.replace(other.finetuning, run=dataclasses.replace(other.finetuning.run, train=changed))
    with pytest.raises(ValueError, match=r"ft_sf holds a run with other options: train\.epochs: 10 there, 11 now"):
        run(dataclasses.replace(other, finetuning=finetuning))
    with pytest.raises(ValueError, match=r"pretrain holds a run with other options: seed: 0 there, 1 now"):
        run(trial(seed=1))


def test_moved_ladder_is_still_finished(trial, tmp_path):
    run(trial())
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "out", moved)
    there = trial()
    pretraining, finetuning = (
        dataclasses.replace(training, run=dataclasses.replace(training.run, output_dir=str(moved / name)))
        for training, name in ((there.pretraining, "pretrain"), (there.finetuning, "ft_sf"))
    )
    start = dataclasses.replace(finetuning.run, init_checkpoint=pretraining.run.output_dir)
    finetuning = dataclasses.replace(finetuning, run=start)
    now = dataclasses.replace(there, pretraining=pretraining, finetuning=finetuning, result=moved / "ft_sf/test.json")
    assert len(run(now)) == 1
    with pytest.raises(ValueError, match="init_checkpoint"):  # one that is not part of the ladder must be the same
        run(dataclasses.replace(now, pretraining=None))


def test_result_without_its_options_is_not_trusted(trial):
    run(trial())
    (trial().pretraining.folder / "run_config.json").unlink()
    with pytest.raises(ValueError, match=r"test\.json is there, but .*run_config\.json is not"):
        run(trial())


def test_data_built_anew_is_noticed(trial, data_dir):
    run(trial())
    write_dataset(data_dir, seed=1, num_rows={"pretrain": 8, "train": 9, "valid": 8, "test": 8})
    with pytest.raises(ValueError, match="was trained on other data"):
        run(trial())


def test_options_of_an_older_version_are_completed_with_defaults(trial):
    training = trial().finetuning
    saved = json.loads(json.dumps(dataclasses.asdict(training.run)))
    del saved["train"]["micro_batches"]
    assert runs.differences(training, saved) == []


def test_numbers_that_a_run_chose_from_the_data_are_not_other_options(trial):
    training = trial().finetuning
    saved = json.loads(json.dumps(dataclasses.asdict(training.run)))
    left = dataclasses.replace(training.run, model=dataclasses.replace(training.run.model, dropout=AUTO))
    assert runs.differences(dataclasses.replace(training, run=left), saved) == []
    saved["model"]["width"] = 32
    assert runs.differences(dataclasses.replace(training, run=left), saved) == ["model.width: 32 there, 64 now"]


def test_failing_command_and_missing_result_are_errors(trial):
    broken = dataclasses.replace(trial(), scoring=("-c", "raise SystemExit(3)"))
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(broken)
    assert caught.value.returncode == 3 and caught.value.cmd[0] == "python"
    with pytest.raises(ValueError, match=r"test\.json is missing or broken"):
        run(dataclasses.replace(trial(), scoring=("-c", "pass")))


def test_termination_is_passed_on_to_the_child(tmp_path):
    """What a batch system sends to us has to reach the training, which then saves."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[2]).touch(), sys.exit(0)))\n"
        "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n"
    )

    def send() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(commands.Stopped, match="asked to stop during: python -c"):
        commands.execute(("-c", code, str(ready), str(saved)))
    assert saved.exists() and signal.getsignal(signal.SIGTERM) is before


def test_tables_do_not_count_as_dense():
    sizes = {
        "table.item": 1000,
        "dense.backbone.embedder.small.category.weight": 100,
        "dense.backbone.embedder.segment.weight": 8,
        "dense.backbone.project_in.layers.1.weight": 16,
        "dense.backbone.tower.blocks.0.qkv.weight": 48,
        "dense.backbone.tower.norm.weight": 4,
        "dense.context.small.tab.weight": 20,
        "dense.context.numerical_scale.age": 1,
        "dense.heads.mlps.click.0.weight": 64,
        "dense_optimizer.backbone.tower.norm.weight.exp_avg": 4,
        "table_optimizer.item": 1000,
    }
    counted = runs.count_parameters(sizes)
    assert counted == {"dense_parameters": 8 + 16 + 48 + 4 + 1 + 64, "table_parameters": 1120, "tower_parameters": 52}


def test_points_are_one_row_per_task(trial):
    result = {"click": {"auc": 0.7, "log_loss": 0.5}, "buy": {"auc": None, "log_loss": 0.1}}
    finished = trial(result=json.dumps(result))
    run(finished)
    counts = {"dense_parameters": 5, "table_parameters": 7, "tower_parameters": 3}
    (finished.finetuning.folder / runs.PARAMETERS_NAME).write_text(json.dumps(counts))  # checkpoints may be gone
    head = {"rung": "l4h64a4", "seed": 0, "embedding_dim": 64, **counts}
    assert runs.points_of(finished) == [{**head, "task": task, **metrics} for task, metrics in result.items()]


def test_file_is_replaced_whole(tmp_path):
    path = pathlib.Path(tmp_path) / "new" / "file"
    runs.replace_file(path, b"one")
    runs.replace_file(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file"]


def test_a_summary_is_replaced_by_one_that_holds_as_much(trial, tmp_path):
    """Before: a ladder of one seed took the place of that of three."""
    path = tmp_path / "scaling_ft_sf_test.json"
    runs.check_nothing_is_lost(path, [trial()])
    path.write_text(json.dumps({"points": [{"rung": "l4h64a4", "seed": seed, "task": "click"} for seed in (0, 1)]}))
    runs.check_nothing_is_lost(path, [trial(seed=seed) for seed in (0, 1, 2)])
    with pytest.raises(ValueError, match=r"also holds l4h64a4 seed 1, which this command leaves out: name them in"):
        runs.check_nothing_is_lost(path, [trial(), trial(seed=2)])
    for text in ("{", "[]", '{"points": [{}]}', '{"points": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="no summary of a ladder"):
            runs.check_nothing_is_lost(path, [trial()])
