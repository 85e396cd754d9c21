"""Checkpoints of one run folder: written aside, committed by one rename, complete, loadable at another world size.

    OUTPUT_DIR/checkpoints/step_00001000/   torch.distributed.checkpoint files of all ranks
                           .../run_state.json    step, data position, metrics, run config, manifest
    OUTPUT_DIR/checkpoints/best.json        step and metric of the best one

A folder without the `step_` name or without `run_state.json` is never read: it is a save that did not finish.
DCP keeps its index in a pickle (`.metadata`): load checkpoints only from a place that you trust.
"""

import dataclasses
import json
import logging
import pathlib
import re
import shutil
import typing

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from gpsd_dist.distributed.runtime import Runtime

log = logging.getLogger(__name__)
STATE_NAME = "run_state.json"
_FOLDER = re.compile(r"step_(\d{8})")

Tensors = dict[str, typing.Any]
"""Nested dict of tensors and ShardedTensors that alias the live state."""


@dataclasses.dataclass(frozen=True)
class RunState:
    """What a checkpoint holds besides tensors; plain JSON."""

    step: int
    """Optimizer steps done."""
    data_position: dict[str, typing.Any]
    """`Loader.state_dict()`"""
    progress: dict[str, typing.Any]
    """Best metric so far, validations without improvement."""
    metrics: dict[str, float]
    """Of the validation at this step; empty if there was none."""
    run_config: dict[str, typing.Any]
    manifest: dict[str, typing.Any]
    world_size: int


class Checkpoints:
    """Saves, finds and prunes the checkpoints of one run folder."""

    def __init__(self, output_dir: str | pathlib.Path, runtime: Runtime, keep_last: int):
        self.folder = pathlib.Path(output_dir) / "checkpoints"
        self._runtime = runtime
        self._keep_last = keep_last

    def save(self, tensors: Tensors, state: RunState, is_best: bool) -> pathlib.Path:
        """Writes one checkpoint; it exists for readers once this returns. Collective: all ranks must call."""
        target = self.folder / f"step_{state.step:08d}"
        aside = self.folder / f".{target.name}.partial"
        if self._runtime.is_main:
            for leftover in (aside, target):
                shutil.rmtree(leftover, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        dcp.save(tensors, checkpoint_id=str(aside))
        if self._runtime.is_main:
            (aside / STATE_NAME).write_text(json.dumps(dataclasses.asdict(state), indent=1))
            aside.rename(target)
            if is_best:
                self._write_best(state)
            self._prune()
        dist.barrier()
        return target

    def latest(self) -> pathlib.Path | None:
        """The newest complete checkpoint."""
        complete = _complete(self.folder)
        return complete[-1] if complete else None

    def _write_best(self, state: RunState) -> None:
        aside = self.folder / "best.json.tmp"
        aside.write_text(json.dumps({"step": state.step, "metrics": state.metrics}))
        aside.replace(self.folder / "best.json")

    def _prune(self) -> None:
        best = best_step(self.folder)
        for path in _complete(self.folder)[: -self._keep_last]:
            if path.name != f"step_{best:08d}":
                shutil.rmtree(path)


def _complete(folder: pathlib.Path) -> list[pathlib.Path]:
    """Complete checkpoints by ascending step."""
    if not folder.is_dir():
        return []
    named = sorted(path for path in folder.iterdir() if _FOLDER.fullmatch(path.name))
    return [path for path in named if (path / STATE_NAME).is_file()]


def best_step(folder: pathlib.Path) -> int:
    """Step of the best checkpoint, -1 if none was marked."""
    path = folder / "best.json"
    return int(json.loads(path.read_text())["step"]) if path.is_file() else -1


def find(path: str | pathlib.Path, which: str = "best") -> pathlib.Path:
    """A checkpoint folder from a run folder ("best" or "last") or from itself. ValueError says what was looked for."""
    path = pathlib.Path(path)
    if (path / STATE_NAME).is_file():
        return path
    folder = path / "checkpoints"
    complete = _complete(folder)
    best = folder / f"step_{best_step(folder):08d}"
    if which == "best" and best in complete:
        return best
    if not complete:
        raise ValueError(
            f"{path} is neither a run folder with a finished checkpoint nor a checkpoint; has the run saved one?"
        )
    return complete[-1]


def read_state(checkpoint: pathlib.Path) -> RunState:
    """Reads `run_state.json`. ValueError names the file if it is broken."""
    path = checkpoint / STATE_NAME
    try:
        return RunState(**json.loads(path.read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a run state ({error}); use another checkpoint") from error


def load_tensors(checkpoint: pathlib.Path, tensors: Tensors) -> None:
    """Fills `tensors` in place, resharding as needed. Collective. ValueError lists keys or shapes that do not fit."""
    saved = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    problems = []
    for key, value in _flat(tensors):
        if key not in saved:
            problems.append(f"{key} is not in it")
        elif tuple(saved[key].size) != tuple(value.size()):
            problems.append(f"{key} has shape {tuple(saved[key].size)} there and {tuple(value.size())} here")
    if problems:
        raise ValueError(f"checkpoint {checkpoint} does not fit this model: " + "; ".join(problems[:8]))
    dcp.load(tensors, checkpoint_id=str(checkpoint))


def saved_keys(checkpoint: pathlib.Path) -> list[str]:
    """Dotted names of all tensors in a checkpoint."""
    return sorted(dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata)


def saved_sizes(checkpoint: pathlib.Path) -> dict[str, int]:
    """Dotted name -> number of elements of every tensor in a checkpoint. Reads no tensor, needs no process group."""
    saved = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    return {name: value.size.numel() for name, value in sorted(saved.items()) if hasattr(value, "size")}


def _flat(tensors: Tensors, prefix: str = "") -> typing.Iterator[tuple[str, torch.Tensor]]:
    for key, value in tensors.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
