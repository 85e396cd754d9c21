"""Training on batches padded to a multiple of tokens: the run without padding, up to rounding."""

import pytest
import torch

from gpsd_dist.distributed.dense_parallel import parallelize
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.model.replaceable import call
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
)

STEPS = 4
FP32 = {"matmul_dtype": "fp32"}


def train_both(rank, world_size, runs):
    """For `run_distributed`."""
    with fixed_negatives():
        for run in runs:
            Trainer(run, cpu_runtime(rank, world_size)).train()


@pytest.mark.equivalence
def test_losses_on_padded_batches_train_two_ranks_as_plain_ones(data_dir, tmp_path):
    """As `cuda_graphs` computes them, without a graph, inside DDP."""
    options = {
        "train": {"max_steps": STEPS, "bf16": True},
        "dense": {"eps": 1e-4},
        "pretrain": {"num_negative_groups": 1},
    }
    ends = []
    for stage in ("pretrain", "finetune"):
        runs = [
            tiny_run(stage, data_dir, tmp_path / f"{stage}_{name}", **options, execution=execution | FP32)
            for name, execution in (("plain", {}), ("padded", {"token_multiple": 64, "cuda_graphs": True}))
        ]
        ends.append(runs)
    run_distributed(train_both, 2, tmp_path, [run for runs in ends for run in runs])
    for plain, padded in ends:
        losses = train_losses(plain.output_dir)
        assert len(losses) == STEPS and train_losses(padded.output_dir) == pytest.approx(losses, rel=1e-5)
        both = (read_checkpoint(step_folder(run.output_dir, STEPS)) for run in (plain, padded))
        assert not differing(*both, rtol=rounding(STEPS))


@pytest.mark.equivalence
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_padded_run_equals_the_run_without_padding(stage, data_dir, tmp_path, one_rank):
    for name, multiple in (("plain", 0), ("padded", 64)):
        run = tiny_run(
            stage,
            data_dir,
            tmp_path / name,
            train={"max_steps": STEPS, "micro_batches": 2},
            dense={"eps": 1e-4},
            execution={"token_multiple": multiple},
        )
        trainer = Trainer(run, one_rank)
        parts = next(iter(trainer.loader))
        assert [part.padded is not None for part in parts] == [multiple > 0] * 2
        trainer.loader.load_state_dict(trainer.loader.state_dict() | {"epoch": 0, "step": 0})
        trainer.train()
    losses = train_losses(tmp_path / "plain")
    assert len(losses) == STEPS and train_losses(tmp_path / "padded") == pytest.approx(losses, rel=1e-5)
    ends = (read_checkpoint(step_folder(tmp_path / name, STEPS)) for name in ("plain", "padded"))
    assert not differing(*ends, rtol=rounding(STEPS))


def test_only_the_transformer_is_padded(data_dir, tmp_path, one_rank):
    options = {"model": {"name": "sasrec", "max_positions": 11}, "execution": {"token_multiple": 64}}
    with pytest.raises(ValueError, match="token_multiple with model 'sasrec': only the transformer"):
        Trainer(tiny_run("pretrain", data_dir, tmp_path, **options), one_rank)


def test_cuda_graphs_are_made_for_more_shapes_than_torch_compiles_by_itself(monkeypatch):
    """Beyond its limit of 8 it would run eagerly."""
    model, made = torch.nn.Module(), []
    model.backbone = torch.nn.Module()
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append((function, options)) or "compiled")
    execution = {"token_multiple": 64, "cuda_graphs": True}
    run = tiny_run("finetune", "data", "out", train={"bf16": True}, execution=execution)
    with torch._dynamo.config.patch(recompile_limit=8):
        parallelize(model, run, Runtime(0, 1, 0, torch.device("cuda", 0)))
        assert torch._dynamo.config.recompile_limit == 64
    assert made == [(call, {"dynamic": False, "mode": "reduce-overhead"})] and model.backbone.call_padded == "compiled"


@pytest.mark.gpu
def test_cuda_graphs_give_the_run_without_them(data_dir, tmp_path, one_rank):
    runtime = Runtime(0, 1, 0, torch.device("cuda", 0))
    for name, execution in (("plain", {}), ("graphs", {"token_multiple": 64, "cuda_graphs": True})):
        train = {"max_steps": STEPS, "bf16": True}
        Trainer(tiny_run("pretrain", data_dir, tmp_path / name, train=train, execution=execution), runtime).train()
    losses = train_losses(tmp_path / "plain")
    assert train_losses(tmp_path / "graphs") == pytest.approx(losses, rel=2e-2)  # bf16
