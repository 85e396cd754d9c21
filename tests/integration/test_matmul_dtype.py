"""A run in bf16 products says so, records it, is resumed in it bit for bit, and goes on in float32 where it has to."""

import logging

from gpsd_dist.checkpoint.state import read_run
from gpsd_dist.distributed import matmul_dtype
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import differing, read_checkpoint, step_folder, tiny_run, train_losses


def recorded(folder, step):
    return read_run(step_folder(folder, step)).run_config["execution"]["matmul_dtype"]


def test_a_run_is_resumed_in_what_was_recorded_or_in_float32(data_dir, tmp_path, one_rank, monkeypatch, caplog):
    # Any CPU computes these products; one without instructions for them takes longer.
    monkeypatch.setattr(matmul_dtype, "has_bf16_products", lambda: True)
    monkeypatch.setattr(logging.getLogger("gpsd_dist"), "propagate", True)
    caplog.set_level(logging.INFO, "gpsd_dist")

    def train(name, steps, asked):
        run = tiny_run("pretrain", data_dir, tmp_path / name, train={"max_steps": steps, "save_interval_steps": steps},
                       execution={"matmul_dtype": asked})  # fmt: skip
        Trainer(run, one_rank).train()

    train("whole", 4, "bf16")
    assert "products of the dense part: bfloat16 operands" in caplog.text
    train("parts", 2, "bf16")
    train("parts", 4, "auto")  # goes on in what was recorded
    assert recorded(tmp_path / "parts", 4) == "bf16"
    assert not differing(read_checkpoint(step_folder(tmp_path / "whole", 4)),
                         read_checkpoint(step_folder(tmp_path / "parts", 4)))  # fmt: skip
    train("wide", 4, "fp32")
    halves, wide = train_losses(tmp_path / "whole"), train_losses(tmp_path / "wide")
    assert halves != wide and all(abs(halves[step] / wide[step] - 1) < 0.02 for step in wide)

    monkeypatch.setattr(matmul_dtype, "has_bf16_products", lambda: False)
    train("parts", 6, "auto")
    assert "products go on in float32, where bf16 was used" in caplog.text
    assert recorded(tmp_path / "parts", 6) == "fp32"
