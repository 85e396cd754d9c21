"""The host never waits for the device outside log steps: on a GPU that would leave it idle between two steps."""

import warnings

import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.stages import losses
from gpsd_dist.trainer import Trainer
from gpsd_dist.training_step import TrainingStep
from tests.helpers.host_syncs import HostSyncs
from tests.integration.tiny_data import tiny_run, train_batch

LOG_INTERVAL = 4
KINDS = {
    "pretrain": ("pretrain", {}),
    "finetune": ("finetune", {}),
    "accumulated": ("finetune", {"train": {"micro_batches": 2}}),
    "hstu": ("pretrain", {"model": {"name": "hstu", "max_positions": 11}}),
    "sasrec": ("pretrain", {"model": {"name": "sasrec", "max_positions": 11}}),
}


def _trainer(kind, data_dir, tmp_path, runtime, execution=None) -> Trainer:
    stage, changes = KINDS[kind]
    train = {"log_interval_steps": LOG_INTERVAL, "max_steps": LOG_INTERVAL + 1} | changes.get("train", {})
    changes = changes | {"train": train, "execution": execution or {}}
    return Trainer(tiny_run(stage, data_dir, tmp_path, **changes), runtime)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("item", lambda x: float(x.sum())),
        ("truth", lambda x: bool((x > 0).all())),
        ("tolist", lambda x: x.tolist()),
        ("new tensor", lambda x: x.new_tensor(1.0)),
        ("tensor", lambda x: torch.tensor([1.0])),
        ("mask", lambda x: x[x > 0]),
        ("write to mask", lambda x: x.masked_fill(x > 0, 0.0).index_put((x > 0,), torch.tensor(1.0))),
        ("nonzero", lambda x: x.nonzero()),
        ("repeat", lambda x: torch.repeat_interleave(x, x.long() + 1)),
        ("backward of a mask", lambda x: x.requires_grad_()[torch.tensor([True, False])].sum().backward()),
    ],
)
def test_watch_finds_what_waits(name, operation):
    with HostSyncs() as watch:
        operation(torch.tensor([1.0, 0.0]))
    assert watch.found, name


def test_watch_lets_pass_what_does_not_wait():
    x, place = torch.tensor([1.0, 0.0]), torch.tensor([1])
    with HostSyncs() as watch:
        (x[place], x.masked_fill(x > 0, 2.0), torch.repeat_interleave(x, x.long() + 1, output_size=3))
    assert not watch.found


def _mask_as_on_cuda(logits_MN, target_M, negative_N):
    logits_MN.masked_fill_(target_M[:, None] == negative_N, float("-inf"))


@pytest.mark.parametrize("kind", KINDS)
def test_step_does_not_wait_outside_log_steps(kind, data_dir, tmp_path, one_rank, monkeypatch):
    """As on a GPU: the finite check is done at log steps alone, accidental hits are found by comparison, and attention
    has no plan of rows, which is made in numpy for the CPU.
    """
    monkeypatch.setattr(Packing, "rows", None)
    monkeypatch.setattr(TrainingStep, "_check_finite", lambda *args: None)
    monkeypatch.setattr(losses, "_mask_hits", _mask_as_on_cuda)
    trainer = _trainer(kind, data_dir, tmp_path, one_rank)
    trainer.metrics.open(0, trainer.total_steps)
    batches = iter(trainer.loader)
    trainer.metrics.record_step(train_batch(trainer, next(batches)))  # plans and allocates
    for _ in range(2):
        parts = next(batches)
        with HostSyncs() as watch:
            trainer.metrics.record_step(train_batch(trainer, parts))
        assert not watch.found
    with HostSyncs() as watch:
        trainer.metrics.log(3)
    assert watch.found  # a log step is what may wait
    trainer.metrics.close()
    trainer.loader.close()


@pytest.mark.gpu
@pytest.mark.parametrize("pipeline", ["plain", "sparse_dist"])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_step_does_not_wait_outside_log_steps(kind, pipeline, data_dir, tmp_path, one_rank):
    """CUDA itself names every call that waits, from the second step on; TorchRec's own are left out, as above."""
    device = torch.device("cuda", 0)
    trainer = _trainer(kind, data_dir, tmp_path, Runtime(0, 1, 0, device), {"pipeline": pipeline})
    trainer.metrics.open(0, trainer.total_steps)
    steps = trainer.training_step.run_steps(trainer.batches(), 0, LOG_INTERVAL)
    next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(LOG_INTERVAL - 2):
                trainer.metrics.record_step(next(steps))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message) and "/torchrec/" not in w.filename]
    assert not [f"{w.filename}:{w.lineno}" for w in waits if "/fbgemm_gpu/" not in w.filename]
    trainer.metrics.close()
    trainer.loader.close()
