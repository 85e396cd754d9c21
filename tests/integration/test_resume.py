"""Resume = uninterrupted, bit for bit on CPU, and what may change between the parts of a run."""

import dataclasses
import json
import logging
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed.checkpoint as dcp

from gpsd_dist.checkpoint.loading import load_tensors
from gpsd_dist.distributed import stopping
from gpsd_dist.schema import read_manifest, write_manifest
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import (
    cpu_runtime,
    differing,
    edit_state,
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

HALF, FULL = 5, 10  # an epoch has 6 steps, so the second part crosses its end
KINDS = ("pretrain", "hstu", "ST", "ST_SF")  # hstu: pretraining too, with negatives per position and padded rows
HSTU = {
    "model": {"name": "hstu", "dropout": 0.2, "max_positions": 11},
    "tables": {"embedding_dim": 14},
    "pretrain": {"negatives_per": "position", "num_negatives": 5, "auxiliary": ()},
}
OTHER_PLAN = {"item": "table_wise", "tag": "column_wise"}


def _run(kind: str, data_dir, source, output_dir, max_steps: int, **changes):
    is_pretraining = kind in ("pretrain", "hstu")
    stage, strategy = ("pretrain", "NT") if is_pretraining else ("finetune", kind)
    options = {"train": {"max_steps": max_steps}} | (HSTU if kind == "hstu" else {"model": {"dropout": 0.2}})
    if kind == "ST":
        options["train"] |= {"average_fraction": 0.3}
    return tiny_run(stage, data_dir, output_dir, strategy, "" if is_pretraining else source, **options | changes)


def _load_and_save(rank: int, world_size: int, run, checkpoint, saved) -> None:
    """Loads a checkpoint into another layout and writes it again."""
    trainer = Trainer(run, cpu_runtime(rank, world_size))
    tensors = trainer._tensors()
    load_tensors(checkpoint, tensors)
    dcp.save(tensors, checkpoint_id=str(saved))


def _stop_one_rank(rank: int, world_size: int, run) -> None:
    """Trains; the signal reaches rank 1 alone, and the ranks exchange their signals at every step."""
    stopping._MOST_STEPS = 1
    trainer = Trainer(run, cpu_runtime(rank, world_size))
    check = trainer.training_step._check_finite

    def check_and_stop(*args):
        if rank == 1 and trainer.step == 2:
            trainer.stops.note(15)
        check(*args)

    trainer.training_step._check_finite = check_and_stop
    trainer.train()


def _second_part(rank: int, world_size: int, runs, relayouts, stopped) -> None:
    _stop_one_rank(rank, world_size, stopped)
    for arguments in relayouts:
        _load_and_save(rank, world_size, *arguments)
    train_runs(rank, world_size, runs)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, data_dir, one_rank):
    """Folder `<ranks>/<kind>/{whole,parts}` and `relayout/`; parts of 2 ranks ran in different processes."""
    root = tmp_path_factory.mktemp("resume")
    source = root / "source"
    train_runs(0, 1, [tiny_run("pretrain", data_dir, source, train={"max_steps": 4})])

    def runs(ranks: int, part: str, steps: int):
        return [_run(kind, data_dir, source, root / str(ranks) / kind / part, steps) for kind in KINDS]

    train_runs(0, 1, [*runs(1, "whole", FULL), *runs(1, "parts", HALF)])
    _as_if_killed_later(root, 1)
    train_runs(0, 1, runs(1, "parts", FULL))

    first = [*runs(2, "whole", FULL), *runs(2, "parts", HALF)]
    run_distributed(train_runs, 2, root, first, timeout_s=300)
    _as_if_killed_later(root, 2)
    # 1 -> 2 -> 1 ranks: a run of one rank goes on with two, and its checkpoint goes through another plan
    moving = _run("ST", data_dir, source, root / "moving", 3, model={"dropout": 0.0})
    train_runs(0, 1, [moving, dataclasses.replace(moving, output_dir=str(root / "staying"), train=_steps(moving, 9))])
    other_plan = _run("ST", data_dir, source, root / "other_plan", 3, tables={"sharding": OTHER_PLAN})
    checkpoint = step_folder(root / "moving", 3)
    relayouts = [(moving, checkpoint, root / "relayout/same"), (other_plan, checkpoint, root / "relayout/other")]
    moved = dataclasses.replace(moving, train=_steps(moving, 6))
    stopped = tiny_run("pretrain", data_dir, root / "stopped")
    run_distributed(_second_part, 2, root, [*runs(2, "parts", FULL), moved], relayouts, stopped, timeout_s=300)
    _load_and_save(0, 1, other_plan, root / "relayout/other", root / "relayout/back")
    train_runs(0, 1, [dataclasses.replace(moving, train=_steps(moving, 9))])
    return root


def _steps(run, max_steps: int):
    return dataclasses.replace(run.train, max_steps=max_steps)


def _as_if_killed_later(root, ranks: int) -> None:
    """Adds what a run leaves that went on after its last checkpoint: later metrics, and half a checkpoint."""
    for kind in KINDS:
        folder = root / str(ranks) / kind / "parts"
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": HALF + 1, "epoch": 1.0, "train/loss": 999.0}) + "\n")
            file.write('{"step": 7, "epo')
        (folder / "checkpoints/step_00000007").mkdir()
        (folder / "checkpoints/.step_00000008.partial").mkdir()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_matches_uninterrupted_run(resumed, ranks, kind):
    whole, parts = (resumed / str(ranks) / kind / part for part in ("whole", "parts"))
    final = read_checkpoint(step_folder(whole, FULL))
    assert not differing(final, read_checkpoint(step_folder(parts, FULL)))
    assert differing(final, read_checkpoint(step_folder(parts, HALF)))
    assert ("table_optimizer.item.momentum1" in final) == (kind != "ST_SF")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_metrics_show_one_history(resumed, ranks, kind):
    whole, parts = (train_losses(resumed / str(ranks) / kind / part) for part in ("whole", "parts"))
    assert list(parts) == list(range(1, FULL + 1))
    assert parts == whole


def test_checkpoint_moves_to_other_ranks_and_plans_unchanged(resumed):
    saved = read_checkpoint(step_folder(resumed / "moving", 3))
    for name in ("same", "other", "back"):
        assert not differing(saved, read_checkpoint(resumed / "relayout" / name)), name


def test_run_goes_on_at_another_world_size(resumed):
    """3 steps on one rank, 3 on two, 3 on one: the run of one rank, up to rounding that Adam amplifies."""
    moving, staying = (train_losses(resumed / name) for name in ("moving", "staying"))
    assert list(moving) == list(range(1, 10))
    assert moving == pytest.approx(staying, rel=1e-3)
    states = [read_checkpoint(step_folder(resumed / name, 9)) for name in ("moving", "staying")]
    assert not differing(*states, rtol=30 * rounding(9))  # 1.6e-5 seen, of 1e-3; Adam's eps is 1e-8 here


def test_finished_run_says_so_and_does_nothing(resumed, data_dir, one_rank, caplog):
    folder = resumed / "1/ST_SF/parts"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run = _run("ST_SF", data_dir, resumed / "source", folder, FULL)
    metrics, messages = _train(run, one_rank, caplog)
    assert any("finished" in message and "nothing to do" in message for message in messages)
    assert "click/auc" in metrics
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_more_steps_continue_a_finished_run_that_has_patience(data_dir, tmp_path, one_rank, caplog):
    def run(steps):
        return tiny_run("finetune", data_dir, tmp_path, train={"max_steps": steps, "patience": 3})

    _train(run(4), one_rank, caplog)
    _train(run(8), one_rank, caplog)
    assert list(train_losses(tmp_path)) == list(range(1, 9))


def test_run_that_stopped_early_stays_stopped(data_dir, tmp_path, one_rank, caplog):
    run = tiny_run("finetune", data_dir, tmp_path, train={"patience": 1, "eval_per_epoch": 6, "epochs": 20})
    _train(run, one_rank, caplog)
    steps = list(train_losses(tmp_path))
    assert len(steps) < 120
    _, messages = _train(run, one_rank, caplog)
    assert any("nothing to do" in message for message in messages)
    assert list(train_losses(tmp_path)) == steps


REFUSED = {
    "seed": 1,
    "model": {"dropout": 0.5},
    "data": {"global_batch_rows": 4},
    "dense": {"peak_lr": 0.5},
    "tables": {"init_std": 0.5},
    "train": {"epochs": 7},
}


@pytest.mark.parametrize("part", REFUSED)
def test_changed_options_are_refused_on_resume(resumed, data_dir, one_rank, part):
    folder = resumed / "1/ST_SF/whole"
    model = {"dropout": 0.2} | (REFUSED["model"] if part == "model" else {})
    train = {"max_steps": FULL + 2} | (REFUSED["train"] if part == "train" else {})
    changes = {"model": model, "train": train} | ({part: REFUSED[part]} if part not in ("model", "train") else {})
    run = _run("ST_SF", data_dir, resumed / "source", folder, FULL, **changes)
    name = part if part == "seed" else f"{part}.{next(iter(REFUSED[part]))}"
    with pytest.raises(ValueError, match="other options") as error:
        Trainer(run, one_rank).train()
    assert name in str(error.value) and "--gin_file config.gin of that run" in str(error.value)


def test_harmless_options_may_change_on_resume(data_dir, tmp_path, one_rank, caplog):
    _train(tiny_run("finetune", data_dir, tmp_path, train={"max_steps": 2}), one_rank, caplog)
    train = {"max_steps": 4, "patience": 9, "keep_last": 1, "log_interval_steps": 2, "save_interval_steps": 3}
    _train(tiny_run("finetune", data_dir, tmp_path, train=train, data={"num_threads": 2}), one_rank, caplog)
    assert list(train_losses(tmp_path)) == [1, 2, 4]


def test_a_run_from_before_an_option_existed_goes_on_with_its_default(data_dir, tmp_path, one_rank, caplog):
    _train(tiny_run("pretrain", data_dir, tmp_path, train={"max_steps": 2}), one_rank, caplog)

    def forget(state: dict) -> None:
        del state["run_config"]["pretrain"]["negatives_per"], state["run_config"]["model"]["max_positions"]

    edit_state(step_folder(tmp_path, 2), forget)
    with pytest.raises(ValueError, match="negatives_per: 'group' there, 'position' now"):
        changed = {"pretrain": {"negatives_per": "position"}, "train": {"max_steps": 4}}
        Trainer(tiny_run("pretrain", data_dir, tmp_path, **changed), one_rank).train()
    _train(tiny_run("pretrain", data_dir, tmp_path, train={"max_steps": 4}), one_rank, caplog)
    assert list(train_losses(tmp_path)) == [1, 2, 3, 4]


def test_other_vocabulary_is_refused_on_resume(data_dir, tmp_path, one_rank, caplog):
    """Same sizes, other ids: DATA_DIR may change, what the rows of a table mean may not."""
    other, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data_dir, other)
    manifest = read_manifest(other)
    tables = tuple(dataclasses.replace(t, fingerprint="new") if t.name == "item" else t for t in manifest.tables)
    _train(tiny_run("finetune", data_dir, output, train={"max_steps": 2}), one_rank, caplog)
    write_manifest(dataclasses.replace(manifest, tables=tables), other)
    with pytest.raises(ValueError, match=r"other data: tables \['item'\]"):
        Trainer(tiny_run("finetune", other, output, train={"max_steps": 4}), one_rank).train()


def test_other_rows_are_refused_on_resume(data_dir, tmp_path, one_rank, caplog):
    other, output = tmp_path / "data", tmp_path / "run"
    write_tiny_data(other, rows={"train": 47})
    _train(tiny_run("finetune", data_dir, output, train={"max_steps": 2}), one_rank, caplog)
    with pytest.raises(ValueError, match=r"splits \[.train.\]"):
        Trainer(tiny_run("finetune", other, output, train={"max_steps": 4}), one_rank).train()


def test_other_values_in_valid_are_refused_on_resume(data_dir, tmp_path, one_rank, caplog):
    """As many rows, candidates and tokens as before, but the best step so far was chosen on others."""
    data, output = shutil.copytree(data_dir, tmp_path / "data"), tmp_path / "run"
    _train(tiny_run("finetune", data, output, train={"max_steps": 2}), one_rank, caplog)
    [path] = (data / "valid").glob("*.parquet")
    rows = pq.read_table(path)
    place = rows.column_names.index("candidate.item")
    items = pa.array([[2] * len(row) for row in rows["candidate.item"].to_pylist()], rows.schema.field(place).type)
    pq.write_table(rows.set_column(place, rows.schema.field(place), items), path, row_group_size=7)
    with pytest.raises(ValueError, match=r"step_00000002 was judged on other rows: the files of split 'valid'"):
        Trainer(tiny_run("finetune", data, output, train={"max_steps": 4}), one_rank).train()


def test_copied_data_are_the_same_data(data_dir, tmp_path, one_rank, caplog):
    shutil.copytree(data_dir, tmp_path / "data")
    _train(tiny_run("finetune", data_dir, tmp_path / "run", train={"max_steps": 2}), one_rank, caplog)
    _train(tiny_run("finetune", tmp_path / "data", tmp_path / "run", train={"max_steps": 4}), one_rank, caplog)
    assert list(train_losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_ranks_agree_on_the_step_to_stop_at(resumed):
    """Only rank 1 was asked to stop, during step 3; the other knew after step 4, which both saved before they left."""
    steps = [path.name for path in (resumed / "stopped/checkpoints").glob("step_*")]
    assert steps == ["step_00000004"]
    assert list(train_losses(resumed / "stopped")) == [1, 2, 3, 4]


def _train(run, runtime, caplog):
    """(metrics, log messages) of one call of train."""
    caplog.clear()
    logger = logging.getLogger("gpsd_dist")
    logger.addHandler(caplog.handler)  # our logger does not propagate once a run has configured it
    try:
        with caplog.at_level(logging.INFO, logger="gpsd_dist"):
            metrics = Trainer(run, runtime).train()
    finally:
        logger.removeHandler(caplog.handler)
    return metrics, [record.getMessage() for record in caplog.records]
