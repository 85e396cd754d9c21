"""Training on batches padded to a multiple of tokens: the run without padding, up to rounding."""

import pytest
import torch

from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import differing, read_checkpoint, rounding, step_folder, tiny_run, train_losses

STEPS = 4


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


@pytest.mark.gpu
def test_cuda_graphs_give_the_run_without_them(data_dir, tmp_path, one_rank):
    from gpsd_dist.distributed.runtime import Runtime

    runtime = Runtime(0, 1, 0, torch.device("cuda", 0))
    for name, execution in (("plain", {}), ("graphs", {"token_multiple": 64, "cuda_graphs": True})):
        train = {"max_steps": STEPS, "bf16": True}
        Trainer(tiny_run("pretrain", data_dir, tmp_path / name, train=train, execution=execution), runtime).train()
    losses = train_losses(tmp_path / "plain")
    assert train_losses(tmp_path / "graphs") == pytest.approx(losses, rel=2e-2)  # bf16
