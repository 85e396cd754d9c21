"""The dense part sharded by FSDP2 trains as the replicated one does, and their checkpoints are the same.

Tolerances as in test_sharding.py: sums over ranks and norms are taken in another order.
"""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpsd_dist.config import OptimizerConfig
from gpsd_dist.data.loaders import evaluation_loader
from gpsd_dist.model.ops.products import has_bf16_products
from gpsd_dist.stages.stage import evaluate_split
from gpsd_dist.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.integration.tiny_data import (
    cpu_runtime,
    differing,
    fixed_negatives,
    read_checkpoint,
    rounding,
    step_folder,
    tiny_run,
    train_losses,
    write_tiny_data,
)

pytestmark = [pytest.mark.equivalence, pytest.mark.timeout(300)]
STEPS, MIDDLE = 6, 3


def _run(stage, data_dir, output_dir, dense_parallel, *, execution=None, **train):
    train = {
        "max_steps": STEPS,
        "save_interval_steps": 1,
        "keep_last": 100,
        "micro_batches": 2,
        "average_fraction": 0.5,
    } | train
    run = tiny_run(
        stage,
        data_dir,
        output_dir,
        model={"layers": 2},
        pretrain={"num_negative_groups": 1},
        dense=OptimizerConfig("adamw", 1e-2, weight_decay=0.1, eps=1e-4),
        train=train,
    )
    options = {"dense_parallel": dense_parallel} | (execution or {})
    return dataclasses.replace(run, execution=dataclasses.replace(run.execution, **options))


def _train(rank: int, world_size: int, runs) -> list[tuple[int, int, int]]:
    """Per run: elements of the dense part, those in this rank's memory, those of its optimizer state."""
    found = []
    with fixed_negatives():
        for run in runs:
            trainer = Trainer(run, cpu_runtime(rank, world_size))
            trainer.train()
            parameters = list(trainer.model.parameters())
            state = [trainer.optimizer.state[parameter]["exp_avg"] for parameter in parameters]
            local = [sum(getattr(t, "_local_tensor", t).numel() for t in part) for part in (parameters, state)]
            found.append((sum(parameter.numel() for parameter in parameters), *local))
    return found


RECOMPUTED = {"activation_checkpointing": True, "pipeline": "sparse_dist"}
FIRST = {  # output folder -> (stage, kind, options)
    "pretrain_ddp": ("pretrain", "ddp", {}),
    "pretrain_fsdp2": ("pretrain", "fsdp2", {}),
    "finetune_ddp": ("finetune", "ddp", {}),
    "finetune_fsdp2": ("finetune", "fsdp2", {}),
    "all_options": ("finetune", "fsdp2", {"execution": RECOMPUTED}),
    "ddp_then_fsdp2": ("pretrain", "ddp", {"max_steps": MIDDLE}),
    "fsdp2_then_ddp": ("pretrain", "fsdp2", {"max_steps": MIDDLE}),
    "fsdp2_then_one": ("pretrain", "fsdp2", {"max_steps": MIDDLE}),
}
RESUMED_ON_TWO = {"ddp_then_fsdp2": "fsdp2", "fsdp2_then_ddp": "ddp", "one_then_fsdp2": "fsdp2"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir, one_rank):
    """(folder of all runs, what `_train` says of the first ones on rank 1)."""
    folder = tmp_path_factory.mktemp("runs")
    _train(0, 1, [_run("pretrain", data_dir, folder / "one_then_fsdp2", "ddp", max_steps=MIDDLE)])
    first = [_run(stage, data_dir, folder / name, kind, **options) for name, (stage, kind, options) in FIRST.items()]
    second = [_run("pretrain", data_dir, folder / name, kind) for name, kind in RESUMED_ON_TWO.items()]
    sizes = run_distributed(_train, 2, folder, first + second, timeout_s=240)[1]
    _train(0, 1, [_run("pretrain", data_dir, folder / "fsdp2_then_one", "ddp")])
    return folder, dict(zip(FIRST, sizes))


class Gathered(TorchDispatchMode):
    """Counts what is gathered, by type."""

    def __init__(self):
        super().__init__()
        self.values: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ == "_allgather_base_":
            self.values[args[1].dtype] = self.values.get(args[1].dtype, 0) + args[1].numel()
        return func(*args, **(kwargs or {}))


def _gathers_of_a_step(rank: int, world_size: int, runs) -> list[tuple[dict[torch.dtype, int], float]]:
    """Per run: values that a rank gives to gathers in its first step, and the loss after three."""
    found = []
    for run in runs:
        trainer = Trainer(run, cpu_runtime(rank, world_size))
        batches = trainer.batches()
        with fixed_negatives(), Gathered() as gathered:
            list(trainer.training_step.run_steps(batches, 0, 1))
        with fixed_negatives():
            *_, last = trainer.training_step.run_steps(batches, 1, 2)
        found.append((gathered.values, float(last.loss_sums_L[0] / last.counts_L[0])))
        trainer.loader.close()
    return found


def test_blocks_are_gathered_in_half_precision_under_autocast(data_dir, tmp_path):
    runs = [
        _run("pretrain", data_dir, tmp_path / f"{kind}_{dtype}", kind, bf16=True, execution={"matmul_dtype": dtype})
        for kind, dtype in (("fsdp2", "fp32"), ("fsdp2", "auto"), ("ddp", "auto"))
    ]
    (wide, _), (half, loss), (_, ddp_loss) = run_distributed(_gathers_of_a_step, 2, tmp_path, runs, timeout_s=120)[0]
    assert set(wide) == {torch.float32}  # as a CPU without products in bfloat16 settles it
    if not has_bf16_products():
        assert half == wide
        return
    assert half[torch.bfloat16] + half[torch.float32] == wide[torch.float32]
    assert half[torch.bfloat16] > half[torch.float32]  # what is in no block stays in float32
    # Gains of norms are rounded to 8 bits as well, matrices by both: eps of bf16 is 0.008.
    assert loss == pytest.approx(ddp_loss, rel=0.008)


def test_every_rank_keeps_half_of_the_dense_part(trained):
    for name, (whole, weights, state) in trained[1].items():
        assert weights == state
        if FIRST[name][1] == "fsdp2":
            assert 0.4 * whole < weights < 0.6 * whole, name
        else:
            assert weights == whole, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pretrain_fsdp2", "pretrain_ddp"), ("finetune_fsdp2", "finetune_ddp"), ("all_options", "finetune_ddp")]
    + [(name, "pretrain_ddp") for name in (*RESUMED_ON_TWO, "fsdp2_then_one")],
)
def test_sharded_and_resharded_runs_equal_the_replicated_one(trained, name, expected):
    mine, theirs = (trained[0] / folder for folder in (name, expected))
    losses = train_losses(theirs)
    assert list(losses) == list(range(1, STEPS + 1))
    assert train_losses(mine) == pytest.approx(losses, rel=1e-4)
    ends = [read_checkpoint(step_folder(folder, STEPS)) for folder in (mine, theirs)]
    assert not differing(*ends, rtol=rounding(STEPS))
    first = read_checkpoint(step_folder(theirs, 1))
    assert (
        float(
            (first["dense.backbone.tower.blocks.1.down.weight"] - ends[1]["dense.backbone.tower.blocks.1.down.weight"])
            .abs()
            .max()
        )
        > 5e-3
    )


def test_gradients_of_the_first_step_are_the_same(trained):
    """exp_avg of the first step is (1 - beta1) times the gradient, clipped."""
    for stage in ("pretrain", "finetune"):
        sides = [read_checkpoint(step_folder(trained[0] / f"{stage}_{kind}", 1)) for kind in ("ddp", "fsdp2")]
        gradients = [{k: v for k, v in side.items() if k.endswith("exp_avg")} for side in sides]
        assert any(float(value.abs().max()) > 1e-3 for value in gradients[0].values())
        assert not differing(*gradients, rtol=rounding(1))


def _score(rank: int, world_size: int, runs) -> list[tuple[dict, list[int]]]:
    """Per run: metrics of `valid` with random weights, and how many requests this rank has in each of its batches."""
    found = []
    for run in runs:
        runtime = cpu_runtime(rank, world_size)
        trainer = Trainer(run, runtime)
        metrics = evaluate_split(run, trainer.manifest, trainer.components, "valid")
        loader = evaluation_loader(run, trainer.manifest, trainer.components.lookup_names, "valid", runtime)
        found.append((metrics, [batch.packing.num_requests for (batch,) in loader]))
    return found


def test_a_rank_without_rows_takes_part_in_the_evaluation(tmp_path):
    """With FSDP2 the forward gathers weights from all ranks: one that skips it for want of rows leaves them waiting."""
    write_tiny_data(tmp_path / "data", rows={"valid": 1})
    kinds = [(stage, kind) for stage in ("finetune", "pretrain") for kind in ("ddp", "fsdp2")]
    runs = [_run(stage, tmp_path / "data", tmp_path / f"{stage}_{kind}", kind) for stage, kind in kinds]
    ranks = run_distributed(_score, 2, tmp_path, runs, timeout_s=150)
    for (replicated, _), (sharded, _) in (ranks[0][:2], ranks[0][2:]):
        assert replicated.keys() == sharded.keys()
        for task, values in replicated.items():
            assert sharded[task] == pytest.approx(values, rel=1e-5, nan_ok=True), task
    assert sorted(sizes for rank in ranks for _, sizes in rank) == [[0]] * 4 + [[1]] * 4
    assert ranks[0][1][0]["click"]["rows"] > 0


def test_fsdp2_on_one_rank_says_that_it_does_nothing(data_dir, tmp_path, one_rank, caplog):
    torch.manual_seed(0)
    Trainer(_run("finetune", data_dir, tmp_path, "fsdp2"), one_rank)
    assert "dense_parallel fsdp2 has no effect on one rank" in caplog.text
