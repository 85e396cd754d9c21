"""Measures how the code is laid out: lines by room, arrows between rooms, functions entered by one pretraining step.

`python -m benchmarks.house`; the table in docs/design.md is made of what it prints.
"""

import ast
import collections
import os
import pathlib
import sys
import tempfile
import threading
import types

import torch
import torch.distributed as dist

import gpsd_dist
from benchmarks.datasets import SOURCES, prepare_synthetic
from gpsd_dist.config import DataConfig, ModelConfig, PretrainConfig, RunConfig, TablesConfig, TrainConfig
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.training_metrics import StepResult
from gpsd_dist.trainer import Trainer

_PACKAGE = pathlib.Path(gpsd_dist.__file__).parent
_TRACED_STEP = 3  # the first ones plan and allocate


def lines_by_room() -> dict[str, int]:
    """Folder or file of the package's root -> lines of Python."""
    lines: collections.Counter[str] = collections.Counter()
    for path in _PACKAGE.rglob("*.py"):
        lines[path.relative_to(_PACKAGE).parts[0]] += len(path.read_text().splitlines())
    return dict(lines)


def arrows() -> set[tuple[str, str]]:
    """Pairs (room, room that it imports)."""
    found = set()
    for path in _PACKAGE.rglob("*.py"):
        here = path.relative_to(_PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gpsd_dist":
                module = node.module.split(".")
                names = [module[1]] if len(module) > 1 else [alias.name for alias in node.names]
                found |= {(here, there) for there in names if there != here}
    return found


def functions_of_a_step() -> dict[str, set[str]]:
    """File -> functions of the package that one pretraining step enters, in all threads."""
    entered: dict[str, set[str]] = collections.defaultdict(set)
    is_on = False

    def note(frame: types.FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if is_on and event == "call" and code.co_filename.startswith(str(_PACKAGE)) and code.co_name[0] != "<":
            entered[os.path.relpath(code.co_filename, _PACKAGE)].add(code.co_qualname)

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(pathlib.Path(folder))
        plain, count = trainer.metrics.record_step, 0

        def record_step(done: StepResult) -> None:
            nonlocal is_on, count
            plain(done)
            count += 1
            is_on = count == _TRACED_STEP  # from the end of one step to the end of the next

        trainer.metrics.record_step = record_step
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            trainer.train()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return dict(entered)


def _trainer(folder: pathlib.Path) -> Trainer:
    data = prepare_synthetic("pretrain", "house", SOURCES["grocery"], 1, folder)
    run = RunConfig(
        stage="pretrain",
        data_dir=str(data.data_dir),
        output_dir=str(folder / "run"),
        data=DataConfig(max_history_length=SOURCES["grocery"].max_history_length, global_batch_rows=64),
        tables=TablesConfig(embedding_dim=32),
        model=ModelConfig(layers=1, width=32, heads=4),
        pretrain=PretrainConfig(num_negatives=64, auxiliary=("category",)),
        train=TrainConfig(max_steps=_TRACED_STEP + 2, log_interval_steps=1000),
    )
    return Trainer(run, Runtime(0, 1, 0, torch.device("cpu")))


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    lines, links, step = lines_by_room(), arrows(), functions_of_a_step()
    for name, number in sorted(lines.items(), key=lambda entry: -entry[1]):
        print(f"{number:6,} {name}")
    print(f"{sum(lines.values()):6,} lines in {len(lines)} rooms, {len(links)} arrows between them")
    print(f"{sum(map(len, step.values()))} functions in {len(step)} files are entered by one pretraining step")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
