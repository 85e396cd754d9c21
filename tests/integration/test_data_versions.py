"""Runs while their data are built again: each reads one version from its first step to its last."""

import dataclasses
import json
import logging
import pathlib
import shutil

import pytest

from gpsd_dist import schema
from gpsd_dist.data import data_versions
from gpsd_dist.data.run_manifest import with_data_version
from gpsd_dist.fit import __main__ as fit
from gpsd_dist.fit import procedure
from gpsd_dist.trained_run import evaluate_checkpoint
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.helpers.versions import publish
from tests.integration.tiny_data import tiny_run, write_tiny_data


@pytest.fixture
def root(data_dir, tmp_path):
    """Folder of two versions with other rows; the first is the current one."""
    write_tiny_data(tmp_path / "other", rows={"train": 47})
    publish(tmp_path / "data", data_dir, tmp_path / "other", current=0)
    yield tmp_path / "data"
    data_versions.release()


def make_current(root: pathlib.Path, name: str) -> None:
    """What the next build does."""
    path = root / data_versions.CURRENT_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": name}))


def train(root: pathlib.Path, output: pathlib.Path, one_rank, max_steps: int) -> str:
    """Trains; returns the name of the version that was read."""
    trainer = Trainer(tiny_run("finetune", root, output, train={"max_steps": max_steps}), one_rank)
    trainer.train()
    return data_versions.name_of(trainer.run.data_dir)


def test_a_resumed_run_goes_on_with_its_version(root, tmp_path, one_rank):
    first, second = sorted(path.name for path in (root / "versions").iterdir())
    assert train(root, tmp_path / "run", one_rank, 2) == first
    make_current(root, second)
    assert train(root, tmp_path / "run", one_rank, 4) == first
    assert train(root, tmp_path / "another", one_rank, 2) == second
    shutil.rmtree(root / "versions" / first)
    with pytest.raises(ValueError, match=rf"no version of {root} has the data that .*/step_00000004"):
        train(root, tmp_path / "run", one_rank, 6)


def test_a_run_of_before_there_were_versions_goes_on_with_its_data(root, data_dir, tmp_path, one_rank):
    plain = shutil.copytree(data_dir, tmp_path / "plain")
    assert train(plain, tmp_path / "run", one_rank, 2) == data_versions.ROOT
    publish(plain, tmp_path / "other")
    assert train(plain, tmp_path / "run", one_rank, 4) == data_versions.ROOT
    assert train(plain, tmp_path / "another", one_rank, 2) == "0001-00000001"


def test_a_run_is_scored_on_its_version_unless_the_split_came_later(root, data_dir, tmp_path, one_rank, caplog):
    first, second = sorted((root / "versions").iterdir())
    train(root, tmp_path / "run", one_rank, 2)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    manifest = schema.read_manifest(second)
    holdout = dataclasses.replace(manifest.split("test"), name="holdout")
    schema.write_manifest(dataclasses.replace(manifest, splits=(*manifest.splits, holdout)), second)
    make_current(root, second.name)
    for split, data, version in (("test", None, first), ("holdout", None, second), ("test", str(root), second)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "gpsd_dist"):
            evaluate_checkpoint(tmp_path / "run", data, split, one_rank, "last")
        assert f"data: version {version.name} of {root}" in caplog.messages
    with pytest.raises(ValueError, match=r"no version of .* has the vocabularies that .*, and a split 'later'"):
        evaluate_checkpoint(tmp_path / "run", None, "later", one_rank, "last")


def _version_on(rank: int, world_size: int, run) -> str:
    if rank > 0:  # it would see another current version if a build ended just now
        data_versions.opened = None
    return with_data_version(run).data_dir


def test_all_ranks_read_what_rank_0_has_found(root, tmp_path):
    run = tiny_run("finetune", root, tmp_path / "run")
    assert run_distributed(_version_on, 2, tmp_path, run) == [str(data_versions.current(root))] * 2


def test_fit_goes_on_with_the_version_it_was_begun_with(root, tmp_path):
    args = fit.parse(["--data", str(root), "--out", str(tmp_path / "fit"), "--nproc", "1"])
    first = args.data = procedure._version(args)
    facts = procedure.look(first)
    args.out.mkdir()
    procedure.begin(args, facts)
    make_current(root, "0002-00000002")
    args.data = root
    assert procedure._version(args) == first
    args.out = tmp_path / "another"
    assert procedure._version(args).name == "0002-00000002"
