"""TorchRec's prefetching pipeline gives the bits of the plain loop: losses, weights, data positions, validations."""

import contextlib
import dataclasses
import json

import pytest
import torch
from torch import nn

from gpsd_dist.tables.prefetch import PrefetchedParts, SparseDistPipeline
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import (
    cpu_runtime,
    differing,
    read_checkpoint,
    step_folder,
    tiny_run,
    train_losses,
)

pytestmark = [pytest.mark.equivalence, pytest.mark.timeout(300)]
STEPS = 9  # an epoch has 6, with validations after 3 and 6: the pipeline is emptied and filled again in between
TRAIN = {"max_steps": STEPS, "eval_per_epoch": 2, "save_interval_steps": 2, "keep_last": 100}


def _run(stage, data_dir, folder, name, strategy="NT", init="", *, pipeline, **train):
    run = tiny_run(stage, data_dir, folder / f"{name}_{pipeline}", strategy, init, train=TRAIN | train)
    return dataclasses.replace(run, execution=dataclasses.replace(run.execution, pipeline=pipeline))


def _runs(data_dir, folder, source):
    """Plain and pipelined: pretraining; finetuning with accumulation and a frozen table beside a trained one."""
    return [
        run
        for pipeline in ("plain", "sparse_dist")
        for run in (
            _run("pretrain", data_dir, folder, "pretrain", pipeline=pipeline),
            _run("finetune", data_dir, folder, "frozen", "ST_SF", source, pipeline=pipeline, micro_batches=2),
        )
    ]


def _train(rank: int, world_size: int, runs) -> list[int]:
    """Trains; returns how many collections each run's pipeline had taken over at the end of its last step."""
    taken = []
    for run in runs:
        trainer = Trainer(run, cpu_runtime(rank, world_size))
        counts = [0]
        record_step = trainer.metrics.record_step

        def count(done, trainer=trainer, counts=counts, record_step=record_step):
            tables = trainer.components.tables.module.module
            collections = [part for part in (tables.trainable, tables.frozen) if part is not None]
            counts.append(sum("forward" in vars(part) for part in collections))
            record_step(done)

        trainer.metrics.record_step = count
        trainer.train()
        taken.append(max(counts))
    return taken


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, one_rank):
    """World size -> (folder of the runs, collections taken over per run)."""
    source = tmp_path_factory.mktemp("source")
    Trainer(tiny_run("pretrain", data_dir, source, train={"max_steps": 2}), one_rank).train()
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    taken = {1: _train(0, 1, _runs(data_dir, one, source))}
    taken[2] = run_distributed(_train, 2, two, _runs(data_dir, two, source), timeout_s=240)[1]
    return {1: (one, taken[1]), 2: (two, taken[2])}


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_collection_is_prefetched(trained, world_size):
    assert trained[world_size][1] == [0, 0, 1, 2]  # plain, plain, the trained one, the trained and the frozen one


@pytest.mark.parametrize("name", ["pretrain", "frozen"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_pipelined_run_has_the_bits_of_the_plain_one(trained, world_size, name):
    plain, pipelined = (trained[world_size][0] / f"{name}_{kind}" for kind in ("plain", "sparse_dist"))
    losses = train_losses(plain)
    assert list(losses) == list(range(1, STEPS + 1)) and losses == train_losses(pipelined)
    for step in (2, 3, 6, STEPS):
        assert not differing(*(read_checkpoint(step_folder(folder, step)) for folder in (plain, pipelined))), step
        states = [
            json.loads((step_folder(folder, step) / "run_state.json").read_text()) for folder in (plain, pipelined)
        ]
        for part in ("data_position", "progress", "metrics"):
            assert states[0][part] == states[1][part], (step, part)
    first, last = (read_checkpoint(step_folder(pipelined, step)) for step in (2, STEPS))
    assert not torch.equal(first["table.tag"], last["table.tag"])
    assert torch.equal(first["table.item"], last["table.item"]) == (name == "frozen")


def test_pipelined_run_resumes_from_where_it_was_trained_not_prefetched(trained, data_dir, tmp_path, one_rank):
    """Step 2 was saved with batches 3 and 4 already taken from the loader."""
    for pipeline, max_steps in (("sparse_dist", 2), ("plain", STEPS)):
        run = _run("pretrain", data_dir, tmp_path, "x", pipeline=pipeline, max_steps=max_steps)
        Trainer(dataclasses.replace(run, output_dir=str(tmp_path / "resumed")), one_rank).train()
    whole = trained[1][0] / "pretrain_plain"
    assert train_losses(tmp_path / "resumed") == train_losses(whole)
    ends = (read_checkpoint(step_folder(folder, STEPS)) for folder in (whole, tmp_path / "resumed"))
    assert not differing(*ends)


class _Copying(nn.Module):
    """Builds its input: what TorchRec's pipeline only logs, and then does not prefetch."""

    def __init__(self, tables):
        super().__init__()
        self.tables = tables

    def forward(self, lookup):
        return self.tables(lookup.to(torch.device("cpu")))


def test_collection_that_would_not_be_prefetched_is_an_error(data_dir, tmp_path, one_rank):
    trainer = Trainer(_run("pretrain", data_dir, tmp_path, "x", pipeline="sparse_dist"), one_rank)
    pipeline = SparseDistPipeline(trainer.components.tables, _Hooks(), contextlib.nullcontext, torch.device("cpu"))
    pipeline._lookup.tables = _Copying(pipeline._lookup.tables)
    batches = iter(trainer.loader)
    with pytest.raises(RuntimeError, match=r"does not prefetch \['tables.tables.trainable'\]"):
        next(pipeline.steps(batches))
    trainer.loader.close()


class _Hooks:
    def zero_grad(self):
        pass

    def forward(self, rows, parts):
        return sum(value.sum() for value in rows.values()), None

    def step(self):
        pass


def test_prefetched_parts_move_and_name_their_lookup(data_dir, tmp_path, one_rank):
    trainer = Trainer(_run("pretrain", data_dir, tmp_path, "x", pipeline="plain", micro_batches=2), one_rank)
    parts = next(iter(trainer.loader))
    moved = PrefetchedParts(parts).to(torch.device("meta"))
    assert moved.lookup is moved.parts[0].lookup and len(moved.parts) == 2
    assert moved.lookup.values().device.type == "meta" and moved.parts[1].packing.position_S.device.type == "meta"
    trainer.loader.close()
