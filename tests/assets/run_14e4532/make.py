"""Makes this folder with the code of commit 14e4532: run there, `PYTHONPATH=. python make.py FOLDER`.

Pretraining and a finetuning (ST_SF, two parts per batch), three steps each, and what that commit got when it went on:
losses of the steps after them, and the scores of `test`. One process, one thread.
"""

import dataclasses
import json
import pathlib
import shutil
import sys

import torch
import torch.distributed as dist

from gpsd_dist.trained_run import evaluate_checkpoint
from gpsd_dist.trainer import Trainer
from tests.integration.tiny_data import cpu_runtime, tiny_run, train_losses, write_tiny_data

STEPS, MORE_STEPS = 3, 6


def main(root: pathlib.Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    write_tiny_data(root / "data", rows={"pretrain": 24, "train": 24, "valid": 8, "test": 8})
    runs = {
        "pretrain": tiny_run("pretrain", root / "data", root / "pretrain"),
        "st_sf": tiny_run("finetune", root / "data", root / "st_sf", "ST_SF", root / "pretrain"),
    }
    expected = {}
    for name, run in runs.items():
        train = dataclasses.replace(run.train, max_steps=STEPS, keep_last=1, micro_batches=2 if name == "st_sf" else 1)
        run = dataclasses.replace(run, train=train)
        Trainer(run, cpu_runtime(0, 1)).train()
        (root / name / "run_config.json").write_text(json.dumps(dataclasses.asdict(run), indent=1))
        shutil.copytree(root / name, root / f"{name}_on")
        more = dataclasses.replace(train, max_steps=MORE_STEPS)
        Trainer(dataclasses.replace(run, output_dir=str(root / f"{name}_on"), train=more), cpu_runtime(0, 1)).train()
        split = "valid" if name == "pretrain" else "test"
        expected[name] = {
            "losses": train_losses(root / f"{name}_on"),
            "scores": evaluate_checkpoint(str(root / name), str(root / "data"), split, cpu_runtime(0, 1), "last"),
        }
        shutil.rmtree(root / f"{name}_on")
        for events in (root / name).glob("events.out*"):
            events.unlink()
    (root / "expected.json").write_text(json.dumps(expected, indent=1))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
