"""A checkpoint meets a vocabulary that grew: old rows move, new ones stay as drawn, and the log says how many."""

import dataclasses
import logging

import pytest
import torch

from gpsd_dist.checkpoint import manager
from gpsd_dist.schema import read_manifest, write_manifest
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.helpers.synthetic import write_dataset
from tests.integration.tiny_data import read_checkpoint, step_folder, tiny_run, train_runs

pytestmark = pytest.mark.timeout(300)

OLD = {"item": 61, "tag": 37, "category": 12}
NEW = {"item": 75, "tag": 37, "category": 15}
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
    train_runs(0, 1, [tiny_run("pretrain", root / "old", root / "source", train={"max_steps": 3})])
    return root


def _run(root, output_dir, strategy, data="new"):
    train = {"max_steps": 1}
    return tiny_run("finetune", root / data, output_dir, strategy, root / "source", seed=7, train=train)


def test_old_rows_are_copied_and_new_ones_stay_random(grown, tmp_path, one_rank, caplog):
    source = read_checkpoint(manager.find(grown / "source"))
    trainer = Trainer(_run(grown, tmp_path, "FT"), one_rank)
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
        assert torch.equal(tensors[name][num_old:], random[name][num_old:])
        assert not torch.equal(random[name][:num_old], source[name])
    assert "table 'item' grew: 61 rows from the checkpoint, 14 new ones random" in caplog.text
    assert "table 'category' grew: 12 rows from the checkpoint, 3 new ones random" in caplog.text
    assert "'tag' grew" not in caplog.text


def test_rows_find_their_place_on_two_ranks(grown, tmp_path):
    """75 rows over 2 ranks lie in other shards than 61 on one did; frozen, they must not move."""
    source = read_checkpoint(manager.find(grown / "source"))
    run_distributed(train_runs, 2, tmp_path, [_run(grown, tmp_path / "st_sf", "ST_SF")], timeout_s=200)
    initial = read_checkpoint(tmp_path / "st_sf" / "initial")["table.item"]
    after = read_checkpoint(step_folder(tmp_path / "st_sf", 1))["table.item"]
    assert torch.equal(after[:61], source["table.item"])
    assert torch.equal(after[61:], initial[61:])


def test_a_vocabulary_that_did_not_grow_from_the_checkpoints_is_refused(grown, tmp_path, one_rank):
    _write(tmp_path / "other", NEW)
    run = dataclasses.replace(_run(grown, tmp_path / "out", "ST"), data_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"another vocabulary \(61 rows there, 75 here"):
        Trainer(run, one_rank).load_weights()
