"""One run that goes on at 1, 2, 4, 3 and 1 ranks, each time under another plan of the tables.

Nothing may depend on how the parts were cut: every row is seen once per epoch and in the same step as by one rank
alone, and a state that is loaded into another layout is the state that was saved, bit for bit. What one rank computes
differs by the order of sums in float32; dense eps is 1e-4, so that Adam does not blow rounding up to whole steps.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
import typing

import pyarrow.parquet as pq
import pytest
import torch.distributed.checkpoint as dcp

from gpsd_dist.config import OptimizerConfig, RunConfig
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import (
    NUM_TAGS,
    STEPS_PER_EPOCH,
    cpu_runtime,
    differing,
    read_checkpoint,
    step_folder,
    tiny_run,
    train_losses,
    train_runs,
    write_tiny_data,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KINDS = ("pretrain", "ST_SF", "wide_ST_SF")  # all tables trained; the item table frozen; the same with columns cut
SOURCES = ("source", "wide_source")
WIDE = 256  # TorchRec's planner cuts columns into pieces of 128 at least
EPOCHS = 4
LEGS = (  # ranks, plan, last step: no leg ends with an epoch
    (1, "row_wise", 4),
    (2, "table_wise", 9),
    (4, "column_wise", 14),
    (3, "row_wise", 19),
    (1, "table_wise", EPOCHS * STEPS_PER_EPOCH),
)


def _run(kind: str, root: pathlib.Path, name: str, plan: str, max_steps: int) -> RunConfig:
    """Wide ones are trained by Adagrad, whose state is cut as its table is; row-wise Adagrad's is not."""
    is_pretraining, is_wide = "pretrain" in kind, kind.startswith("wide")
    stage, strategy = ("pretrain", "NT") if is_pretraining else ("finetune", "ST_SF")
    return tiny_run(
        stage,
        root / "data",
        root / kind / name,
        strategy,
        "" if is_pretraining else root / SOURCES[is_wide],
        tables={"embedding_dim": WIDE if is_wide else 16, "sharding": {"item": plan, "tag": plan}},
        data={"num_data_shards": 12},
        sparse=OptimizerConfig("adagrad" if is_wide else "rowwise_adagrad", 0.05),
        dense=OptimizerConfig("adamw", 1e-2, weight_decay=0.1, eps=1e-4),
        train={"max_steps": max_steps, "epochs": EPOCHS, "keep_last": 9},
    )


def _legs(rank: int, world_size: int, sources: list[RunConfig], legs: list[tuple[list[RunConfig], str]]) -> list[str]:
    """Plans of the last one."""
    train_runs(rank, world_size, sources)
    return [_leg(rank, world_size, runs, name) for runs, name in legs][-1]


def _leg(rank: int, world_size: int, runs: list[RunConfig], loaded_name: str) -> list[str]:
    """Saves every run as it was loaded, then trains it on, and writes down which rows each step got."""
    plans = []
    for run in runs:
        output = pathlib.Path(run.output_dir)
        if (output / "checkpoints").is_dir():
            fresh = Trainer(run, cpu_runtime(rank, world_size))
            fresh.load_weights()
            dcp.save(fresh._tensors(), checkpoint_id=str(output / loaded_name))
        trainer = Trainer(run, cpu_runtime(rank, world_size))
        with _traced(trainer, output.parent / f"{output.name}_rows" / f"{loaded_name}_{rank}"):
            trainer.train()
        plans.append(trainer.components.tables.plan)
    return plans


@contextlib.contextmanager
def _traced(trainer: Trainer, path: pathlib.Path) -> typing.Iterator[None]:
    """Writes (step, rows) of all batches that the trainer takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    original = trainer.batches
    with open(path, "a") as file:

        def batches() -> typing.Iterator:
            for parts in original():
                rows = [user for part in parts for user in part.user_hash_B.tolist()]
                file.write(json.dumps([trainer.step + 1, rows]) + "\n")
                yield parts

        trainer.batches = batches
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """root / kind / {moving, staying}, with what each leg loaded."""
    root = tmp_path_factory.mktemp("elastic")
    write_tiny_data(root / "data")
    sources = [
        dataclasses.replace(_run(kind, root, "", "row_wise", 3), output_dir=str(root / name))
        for kind, name in zip(("pretrain", "wide_pretrain"), SOURCES, strict=True)
    ]
    staying = [_run(kind, root, "staying", "row_wise", LEGS[-1][2]) for kind in KINDS]
    plans = []
    for ranks, plan, last_step in LEGS:
        legs = [([_run(kind, root, "moving", plan, last_step) for kind in KINDS], f"loaded_before_{last_step}")]
        first = (sources, [(staying, "loaded")]) if not plans else ([], [])  # in the processes of the first leg
        plans.append(run_distributed(_legs, ranks, root, first[0], first[1] + legs, timeout_s=240)[0])
    return root, plans


def rows_by_step(folder: pathlib.Path) -> dict[int, collections.Counter]:
    rows: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            step, users = json.loads(line)
            rows[step].update(users)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_seen_once_per_epoch_and_in_its_step(finished, kind):
    root, _ = finished
    moving, staying = (rows_by_step(root / kind / f"{name}_rows") for name in ("moving", "staying"))
    assert moving == staying
    split = "pretrain" if kind == "pretrain" else "train"
    [path] = (root / "data" / split).glob("*.parquet")
    everyone = collections.Counter(pq.read_table(path)["user_hash"].to_pylist())
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        assert sum((moving[step] for step in steps), collections.Counter()) == everyone, epoch


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_the_saved_one_bit_for_bit_in_every_layout(finished, kind):
    root, _ = finished
    output = root / kind / "moving"
    for (_, _, saved_step), (_, _, last_step) in itertools.pairwise(LEGS):
        saved, loaded = (
            read_checkpoint(step_folder(output, saved_step)),
            read_checkpoint(output / f"loaded_before_{last_step}"),
        )
        assert not differing(saved, loaded), saved_step
        assert ("table_optimizer.item.momentum1" in saved) == (kind == "pretrain")
        assert saved["table_optimizer.tag.momentum1"].numel() == NUM_TAGS * (WIDE if kind.startswith("wide") else 1)


def test_tables_lay_where_the_plans_say(finished):
    _, plans = finished
    for kind, plan in zip(KINDS, plans[2], strict=True):
        item = next(line for line in plan.splitlines() if line.startswith("table item"))
        if kind.startswith("wide"):
            ranks = re.search(r"61 x 128 on ranks (\d)-(\d)", item)  # neighbours stand together
            assert int(ranks[2]) - int(ranks[1]) == 1 if ranks else item.count("61 x 128 on rank ") == 2, item
        else:
            assert item.count("61 x 16 on rank ") == 1, kind
        assert "column_wise" in item, kind
    assert all("table_wise" in plan for plan in plans[1] + plans[4])


@pytest.mark.parametrize(("kind", "source"), zip(KINDS[1:], SOURCES, strict=True))
def test_frozen_table_keeps_its_bits_all_the_way(finished, kind, source):
    root, _ = finished
    pretrained = read_checkpoint(step_folder(root / source, 3))
    for _, _, last_step in LEGS:
        checkpoint = read_checkpoint(step_folder(root / kind / "moving", last_step))
        assert checkpoint["table.item"].equal(pretrained["table.item"])
        assert not checkpoint["table.tag"].equal(pretrained["table.tag"])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_losses_are_those_of_one_rank(finished, kind):
    """Not in pretraining, where ranks draw their own negatives."""
    root, _ = finished
    moving, staying = (train_losses(root / kind / name) for name in ("moving", "staying"))
    assert list(moving) == list(staying) == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert moving == pytest.approx(staying, rel=1e-3)
