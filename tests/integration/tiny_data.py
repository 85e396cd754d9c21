"""Runs of seconds on a tiny data set, for one rank or several, and what they leave behind.

Nothing here is learnable: the tests compare runs with each other. The sizes are odd, so that nothing divides evenly.
"""

import contextlib
import dataclasses
import json
import pathlib
import typing

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from gpsd_dist import config, schema
from gpsd_dist.checkpoint import files, integrity, manager
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.data import collate
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.training_metrics import StepResult
from gpsd_dist.trainer import Trainer
from tests.helpers.synthetic import write_dataset

NUM_ITEMS, NUM_TAGS = 61, 37
SHARDED_TABLES = ("item", "tag")  # the others are below `small_table_max_rows`
GLOBAL_BATCH_ROWS = 8
STEPS_PER_EPOCH = 6  # 46 rows in batches of 8


def write_tiny_data(data_dir: pathlib.Path, *, seed: int = 0, num_items: int = NUM_ITEMS, rows=None) -> schema.Manifest:
    """`rows`: split -> number of rows, where it should differ."""
    return write_dataset(
        data_dir,
        seed=seed,
        num_rows={"pretrain": 46, "train": 46, "valid": 21, "test": 13} | (rows or {}),
        num_files=1,
        row_group_rows=7,
        table_rows={"item": num_items, "tag": NUM_TAGS},
        max_history_length=12,
    )


def tiny_run(stage: str, data_dir, output_dir, strategy: str = "NT", init_checkpoint="", **changes) -> config.RunConfig:
    """A run of seconds. `changes` are fields of RunConfig's parts: `model={"dropout": 0.1}, train={"max_steps": 5}`."""
    run = config.RunConfig(
        stage=stage,
        data_dir=str(data_dir),
        output_dir=str(output_dir),
        strategy=strategy,
        init_checkpoint=str(init_checkpoint),
        data=config.DataConfig(
            max_history_length=10, global_batch_rows=GLOBAL_BATCH_ROWS, eval_batch_rows_per_rank=4, num_data_shards=2
        ),
        tables=config.TablesConfig(embedding_dim=16, small_table_max_rows=20),
        model=config.ModelConfig(layers=1, width=16, heads=2, context_dim=4),
        pretrain=config.PretrainConfig(num_negative_groups=2, num_negatives=16, auxiliary=("category",)),
        dense=config.OptimizerConfig("adamw", 1e-2, weight_decay=0.1),
        train=config.TrainConfig(epochs=3, log_interval_steps=1, keep_last=3),
    )
    for part, fields in changes.items():
        new = dataclasses.replace(getattr(run, part), **fields) if isinstance(fields, dict) else fields
        run = dataclasses.replace(run, **{part: new})
    return run


def cpu_runtime(rank: int, world_size: int) -> Runtime:
    return Runtime(rank, world_size, rank, torch.device("cpu"))


def train_runs(rank: int, world_size: int, runs: list[config.RunConfig]) -> list[str]:
    """For `run_distributed`: trains run after run, leaving the random weights of each in OUTPUT_DIR/initial."""
    plans = []
    for run in runs:
        trainer = Trainer(run, cpu_runtime(rank, world_size))
        dcp.save(trainer.components.weights(), checkpoint_id=f"{run.output_dir}/initial")
        trainer.train()
        plans.append(trainer.components.tables.plan)
    return plans


def train_batch(trainer: Trainer, parts) -> StepResult:
    """One optimizer step of a trainer on this batch, outside its loop."""
    (done,) = trainer.training_step.run_steps(iter([parts]), trainer.step, 1)
    trainer.step += 1
    return done


@contextlib.contextmanager
def fixed_negatives() -> typing.Iterator[None]:
    """Ranks and parts of a batch draw different negatives; inside, all get the same ones, to be comparable.

    For one group, or one set per position: then they depend on the position's own target.
    """
    original = collate.Collate._read
    items = (np.arange(20).reshape(1, 20) * 7) % (NUM_ITEMS - 2) + 2

    def read(self, *args):
        part = original(self, *args)  # its negatives are drawn next

        def draw(random, num_sets, num_negatives, limit):
            if self.negatives_per != "position":
                return items.copy()
            target_M = part.columns["history"][self.manifest.item_feature][part.target_token_M]
            return (items - 2 + target_M[:, None]) % (NUM_ITEMS - 2) + 2

        object.__setattr__(self, "sampler", draw)
        return part

    collate.Collate._read = read
    try:
        yield
    finally:
        collate.Collate._read = original


def train_losses(output_dir) -> dict[int, float]:
    """Step -> `train/loss`. Fails if a step has two."""
    losses: dict[int, float] = {}
    for line in (pathlib.Path(output_dir) / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "train/loss" in entry:
            assert entry["step"] not in losses, f"two losses of step {entry['step']}"
            losses[entry["step"]] = entry["train/loss"]
    return losses


def read_checkpoint(checkpoint: Location) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, under its dotted name; needs no process group."""
    reader = files.Reader(checkpoint)
    saved = reader.index.state_dict_metadata
    tensors = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in saved.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def edit_state(checkpoint: pathlib.Path, edit: typing.Callable[[dict], typing.Any]) -> None:
    """Changes `run_state.json` of a checkpoint in place, and its checksum with it."""
    path = checkpoint / manager.STATE_NAME
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))
    sums = integrity.read_checksums(checkpoint)
    expected = sums.files | {manager.STATE_NAME: integrity.sum_of(path.read_bytes())}
    (checkpoint / integrity.CHECKSUMS_NAME).write_bytes(dataclasses.replace(sums, files=expected).to_json())


def step_folder(output_dir, step: int) -> pathlib.Path:
    return pathlib.Path(output_dir) / "checkpoints" / f"step_{step:08d}"


def rounding(steps: int) -> float:
    """Relative tolerance for float32 results after `steps` optimizer steps whose sums were taken in another order.

    A sum of n float32 terms in another order is off by about sqrt(n) x 2^-24 of the terms' size. The sums here (rows of
    a batch, columns of a product) have up to about a thousand terms: 32 x 2^-24, twice that for the sums before them,
    and every step adds to it. Largest errors seen with ATEN_CPU_CAPABILITY=default | avx2 | avx512 on a Zen 4:
    4.3e-7 of 3.8e-6 after one step, 2.6e-6 of 3.1e-5 after eight. What is off by a thousandth is found: see
    `test_planted_faults_exceed_the_tolerance` in test_sharding.py.
    """
    return 64 * 2.0**-24 * steps


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], *, rtol: float = 0.0) -> dict:
    """Names that are missing on one side, or whose largest difference exceeds `rtol` times the tensor's largest value.

    {} means equal, bit for bit where `rtol` is 0. The yardstick is the size of the whole tensor: rounding is relative
    to the terms of a sum, however large they are (row-wise Adagrad's momentum reaches 1,000, where floats are 2^-14
    apart) and however small the sum is where they cancel. A small tensor beside a large one has its own yardstick.
    """
    problems: dict[str, typing.Any] = dict.fromkeys(set(left) ^ set(right), "only on one side")
    for name in sorted(set(left) & set(right)):
        if left[name].shape != right[name].shape:
            problems[name] = (left[name].shape, right[name].shape)
            continue
        error, size = _size(left[name] - right[name]), max(_size(left[name]), _size(right[name]))
        if not error <= rtol * size:  # NaN differs from everything
            problems[name] = error / size
    return problems


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
