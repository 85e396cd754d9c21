"""A checkpoint meets a vocabulary that grew: old rows move, new ones start as asked, and may be trained alone."""

import dataclasses
import logging
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gpsd_dist.checkpoint import manager
from gpsd_dist.config import OptimizerConfig
from gpsd_dist.schema import read_manifest, write_manifest
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.helpers.synthetic import write_dataset
from tests.integration.tiny_data import differing, read_checkpoint, rounding, step_folder, tiny_run, train_runs

pytestmark = pytest.mark.timeout(300)

OLD = {"item": 61, "tag": 37, "category": 12}
NEW = {"item": 75, "tag": 37, "category": 15}
MODEL = {"width": 8}  # another one than that of the tables, so that there are projections
ROWS = {"pretrain": 30, "train": 30, "valid": 9, "test": 9}


def _write(folder, table_rows):
    return write_dataset(folder, seed=0, num_rows=ROWS, num_files=1, table_rows=table_rows, max_history_length=12)


@pytest.fixture(scope="module")
def grown(tmp_path_factory, one_rank):
    """Root of `old` and `new` (data; `new` says that it grew from `old`), and of `source`, trained on `old`."""
    root = tmp_path_factory.mktemp("growth")
    old = _write(root / "old", OLD)
    _write(root / "new", NEW)
    manifest = read_manifest(root / "new")
    step = {"tables": [dataclasses.asdict(table) for table in old.tables]}
    write_manifest(dataclasses.replace(manifest, options=manifest.options | {"chain": [step]}), root / "new")
    train_runs(0, 1, [tiny_run("pretrain", root / "old", root / "source", train={"max_steps": 3}, model=MODEL)])
    return root


def _run(root, output_dir, strategy, stage="finetune", max_steps=1, **changes):
    changes = {"seed": 7, "train": {"max_steps": max_steps}, "model": MODEL} | changes
    return tiny_run(stage, root / "new", output_dir, strategy, root / "source", **changes)


def _like_others(root, old_DE: torch.Tensor) -> np.ndarray:
    """Starting values of new items, in plain loops: the unknown row + mean of old rows of their category - of all."""
    category = dict(zip(*pq.read_table(root / "new" / "items.parquet").to_pydict().values(), strict=True))
    rows = old_DE.double().numpy()
    alike = [[row for row in range(2, 61) if category[row] == category[new]] for new in range(61, 75)]
    assert all(alike)
    return np.stack([rows[1] + rows[group].mean(axis=0) - rows[2:].mean(axis=0) for group in alike])


@pytest.mark.parametrize("new_rows", ["attributes", "unknown", "random"])
def test_old_rows_are_copied_and_new_ones_start_as_asked(grown, tmp_path, one_rank, caplog, new_rows):
    source = read_checkpoint(manager.find(grown / "source"))
    trainer = Trainer(_run(grown, tmp_path, "FT", tables={"new_rows": new_rows}), one_rank)
    weights = trainer.components.weights()
    tensors = {
        "table.item": weights["table"]["item"].local_shards()[0].tensor,
        "dense.backbone.embedder.small.category.weight": weights["dense"]["backbone.embedder.small.category.weight"],
    }
    random = {name: value.clone() for name, value in tensors.items()}
    with caplog.at_level(logging.INFO):
        trainer.load_weights()
    for name, num_old in (("table.item", 61), ("dense.backbone.embedder.small.category.weight", 12)):
        assert len(source[name]) == num_old < len(tensors[name])
        assert torch.equal(tensors[name][:num_old], source[name])
        unknown = source[name][1].expand_as(random[name][num_old:])
        if new_rows == "attributes" and name == "table.item":
            expected = torch.from_numpy(_like_others(grown, source[name])).float()
            # Both are float64 until here; the last bit may be rounded the other way.
            assert (tensors[name][num_old:] - expected).abs().max() <= 2.0**-24 * expected.abs().max()
            assert (expected - unknown).abs().max() > 0.01
        else:
            assert torch.equal(tensors[name][num_old:], random[name][num_old:] if new_rows == "random" else unknown)
        assert not torch.equal(random[name][:num_old], source[name])
    plus = " and rows alike in category" if new_rows == "attributes" else ""
    start = "random" if new_rows == "random" else "from the unknown row"
    assert f"table 'item' grew: 61 rows from the checkpoint, 14 new ones {start}{plus}\n" in caplog.text
    assert f"table 'category' grew: 12 rows from the checkpoint, 3 new ones {start}\n" in caplog.text
    assert "'tag' grew" not in caplog.text


ALONE = {"frozen_rows": "auto"}
STEPS = 4
HELD = OptimizerConfig("adamw", 0.0, weight_decay=0.1)


@pytest.fixture(scope="module")
def on_two_ranks(grown, tmp_path_factory):
    """Root of `st_sf`, `random` (frozen tables), `fsdp2` (dense part held), `alone` (new rows trained), on 2 ranks."""
    root = tmp_path_factory.mktemp("two_ranks")
    runs = [_run(grown, root / "st_sf", "ST_SF"), _run(grown, root / "random", "ST_SF", tables={"new_rows": "random"})]
    runs.append(_run(grown, root / "fsdp2", "FT", execution={"dense_parallel": "fsdp2"}, dense=HELD))
    runs.append(_run(grown, root / "alone", "ST_SF", max_steps=STEPS, tables=ALONE))
    run_distributed(train_runs, 2, root, runs, timeout_s=200)
    return root


@pytest.mark.equivalence
def test_rows_find_their_place_on_two_ranks(grown, on_two_ranks, tmp_path, one_rank):
    """75 rows over 2 ranks lie in other shards than 61 on one did; frozen, they must not move."""
    source = read_checkpoint(manager.find(grown / "source"))["table.item"]
    initial = read_checkpoint(on_two_ranks / "random" / "initial")["table.item"]
    after = read_checkpoint(step_folder(on_two_ranks / "random", 1))["table.item"]
    assert torch.equal(after[:61], source)
    assert torch.equal(after[61:], initial[61:])
    trainer = Trainer(_run(grown, tmp_path, "ST_SF"), one_rank)
    trainer.load_weights()
    of_one_rank = trainer.components.weights()["table"]["item"].local_shards()[0].tensor
    assert torch.equal(read_checkpoint(step_folder(on_two_ranks / "st_sf", 1))["table.item"], of_one_rank)
    assert not torch.equal(of_one_rank[61:], initial[61:])


@pytest.mark.equivalence
def test_new_rows_are_trained_alone(grown, on_two_ranks, tmp_path, one_rank):
    """Old rows keep their bits, on one rank and on two; a run that goes on is the run that was not stopped."""
    source = read_checkpoint(manager.find(grown / "source"))["table.item"]
    start = torch.from_numpy(_like_others(grown, source)).float()
    straight, resumed = (_run(grown, tmp_path / name, "ST_SF", max_steps=STEPS, tables=ALONE) for name in "sr")
    gone = tmp_path / "gone"
    shutil.copytree(grown / "source", gone)
    resumed = dataclasses.replace(resumed, init_checkpoint=str(gone))
    train_runs(0, 1, [straight, dataclasses.replace(resumed, train=dataclasses.replace(resumed.train, max_steps=2))])
    shutil.rmtree(gone)  # how many rows were old is known from the run's own checkpoint
    Trainer(resumed, one_rank).train()
    whole, in_parts = (read_checkpoint(step_folder(tmp_path / name, STEPS)) for name in "sr")
    sharded = read_checkpoint(step_folder(on_two_ranks / "alone", STEPS))
    assert differing(whole, in_parts) == {}
    assert differing(whole, sharded, rtol=rounding(STEPS)) == {}
    for found in (whole, sharded):
        assert torch.equal(found["table.item"][:61], source)
        moves = (found["table.item"][61:] - start).abs().amax(dim=1) > 1e-3
        assert moves[:6].all() and not moves[6:].any()  # the data show no item from 67 on
        assert not found["table_optimizer.item.momentum1"][:61].any()


def test_new_rows_of_a_small_table_start_alike_where_the_dense_part_is_spread(grown, on_two_ranks):
    name = "dense.backbone.embedder.small.category.weight"
    old = read_checkpoint(manager.find(grown / "source"))[name]
    found = read_checkpoint(step_folder(on_two_ranks / "fsdp2", 1))[name]
    assert torch.equal(found, torch.cat([old, old[1].expand(3, -1)]))


def test_pretraining_goes_on_with_the_new_rows_alone(grown, tmp_path, one_rank):
    """Without a rate for the dense part all is held but the new rows, the output projection included."""
    source = read_checkpoint(manager.find(grown / "source"))
    train_runs(0, 1, [_run(grown, tmp_path, "FT_SF", "pretrain", STEPS, tables=ALONE, dense=HELD)])
    after = read_checkpoint(step_folder(tmp_path, STEPS))
    dense = {name: value for name, value in source.items() if name.startswith("dense.") and ".category." not in name}
    assert (
        any("project_out" in name for name in dense) and differing(dense, {name: after[name] for name in dense}) == {}
    )
    assert torch.equal(after["table.item"][:61], source["table.item"])
    start = torch.from_numpy(_like_others(grown, source["table.item"])).float()
    moves = (after["table.item"][61:] - start).abs().amax(dim=1) > 1e-3
    assert moves[:6].all()  # those that the data show; of the others, those that were drawn as negatives


def test_a_vocabulary_that_did_not_grow_from_the_checkpoints_is_refused(grown, tmp_path, one_rank):
    _write(tmp_path / "other", NEW)
    run = dataclasses.replace(_run(grown, tmp_path / "out", "ST"), data_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"another vocabulary \(61 rows there, 75 here"):
        Trainer(run, one_rank).load_weights()


def test_a_learnt_bias_grows_with_the_items(grown, tmp_path, one_rank):
    """Old items keep theirs, new ones begin with none."""
    biased = {"pretrain": {"item_bias": True}, "model": MODEL}
    source = tiny_run("pretrain", grown / "old", tmp_path / "source", train={"max_steps": 3}, **biased)
    train_runs(0, 1, [source])
    learnt = read_checkpoint(manager.find(tmp_path / "source"))["dense.item_score.bias_V"]
    run = _run(grown, tmp_path / "next", "FT", "pretrain", **biased)
    trainer = Trainer(dataclasses.replace(run, init_checkpoint=source.output_dir), one_rank)
    trainer.load_weights()
    bias_V = trainer.components.weights()["dense"]["item_score.bias_V"]
    assert learnt.any() and torch.equal(bias_V[:61], learnt) and len(bias_V) == 75 and not bias_V[61:].any()


def test_a_warm_start_grows_small_tables_under_the_names_of_their_features(tmp_path, one_rank):
    """Table `tag` is read by `tags` of tokens and by `interests` of the context, which has rows of its own."""
    old = _write(tmp_path / "old", OLD)
    _write(tmp_path / "new", OLD | {"tag": 39})
    manifest = read_manifest(tmp_path / "new")
    step = {"tables": [dataclasses.asdict(table) for table in old.tables]}
    write_manifest(dataclasses.replace(manifest, options=manifest.options | {"chain": [step]}), tmp_path / "new")
    options = {"tables": {"small_table_max_rows": 50, "transfer": ("item",)}, "train": {"max_steps": 1}}
    train_runs(0, 1, [tiny_run("finetune", tmp_path / "old", tmp_path / "source", **options)])
    source = read_checkpoint(manager.find(tmp_path / "source"))
    options |= {"finetune": {"warm_start": True}, "seed": 7}
    run = tiny_run("finetune", tmp_path / "new", tmp_path / "next", "FT", tmp_path / "source", **options)
    trainer = Trainer(run, one_rank)
    trainer.load_weights()
    dense = trainer.components.weights()["dense"]
    for name in ("backbone.embedder.small.tag.weight", "context.small.interests.weight"):
        before = source[f"dense.{name}"]
        assert torch.equal(dense[name], torch.cat([before, before[1].expand(2, -1)])), name
