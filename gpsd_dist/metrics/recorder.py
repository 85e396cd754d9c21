"""Reduces the metrics of a run over steps and ranks; writes them to `metrics.jsonl`, TensorBoard, MLflow, the screen.

Others decide what is measured and when a log step is due. Names are paths: train/loss, gap/click_log_loss,
valid/click/auc, perf/tokens_per_s.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import re
import secrets
import time
import typing
import zlib

import torch
import torch.distributed as dist
import torch.utils.tensorboard
from torch.utils.tensorboard.summary import hparams

from gpsd_dist.disk.reading import open_regular
from gpsd_dist.disk.writing import check_place, sync, write
from gpsd_dist.metrics.mlflow_writer import MlflowWriter
from gpsd_dist.metrics.progress_bar import ProgressBar
from gpsd_dist.validation import json_safe

REDUCTIONS = ("mean", "sum", "max", "last")
JSONL_NAME = "metrics.jsonl"
_NAME = re.compile(r"[A-Za-z0-9_.@-]+(/[A-Za-z0-9_.@-]+)+")
_SLOTS = 256  # a message has room for a multiple of this: ranks with a few more or less names notice it, not hang
_LOGGER = logging.getLogger(__name__)


class Recorder:
    """Collects metrics on every rank; rank 0 writes them into `output_dir`."""

    def __init__(
        self,
        output_dir: str | os.PathLike,
        rank: int,
        *,
        resume_step: int | None = None,
        progress: ProgressBar | None = None,
        device: torch.device | str = "cpu",
    ):
        """Opens the files of rank 0; not collective. Without a process group, nothing is reduced over ranks.

        `resume_step`: step of the checkpoint that the run continues from. Entries of later steps are removed, so that a
        curve never shows two histories. None: a new run, all old entries are removed.
        `device`: where the reduction runs; one that the process group has a backend for.
        """
        self._rank, self._device = rank, torch.device(device)
        self._reductions: dict[str, str] = {}
        self._windows: dict[str, tuple[typing.Any, float]] = {}
        """Name -> (value, how often it was recorded) since the last log step; tensors stay on their device."""
        self._progress = progress if rank == 0 else None
        self._jsonl = self._tensorboard = None
        self._mlflow: MlflowWriter | None = None
        self._has_failed = False
        self._final: tuple[dict[str, float], int] = {}, 0
        if rank == 0:
            output_dir = self._folder = pathlib.Path(output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            keep_step = -1 if resume_step is None else resume_step
            truncate_jsonl(output_dir / JSONL_NAME, keep_step)
            appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            self._jsonl = os.fdopen(open_regular(output_dir / JSONL_NAME, appending), "a", encoding="ascii")
            self._event_name = f".{secrets.token_hex(8)}"  # TensorBoard opens by name: nobody shall lay a link there
            self._tensorboard = torch.utils.tensorboard.SummaryWriter(
                output_dir, purge_step=keep_step + 1, filename_suffix=self._event_name
            )

    def describe(self, options: dict[str, typing.Any], mlflow_uri: str = "", *, is_resumed: bool = False) -> None:
        """Writes the options of the run, dotted name -> value, as hyperparameters; to MLflow, too, if it has a URI.

        Not collective; once, before the first `log`.
        """
        if self._rank != 0:
            return
        self._add_hparams(hparams({name: _hparam(value) for name, value in options.items()}, {})[1])
        if mlflow_uri:
            path = self._folder / JSONL_NAME
            self._mlflow = MlflowWriter(mlflow_uri, path, options, is_resumed=is_resumed)

    def finish(self, best: dict[str, float], step: int) -> None:
        """Writes the best validation of a finished run, "task/metric" -> value, as best/... at `step`. Of rank 0."""
        self._final = best, step
        if self._rank == 0:
            for name, value in best.items():
                self._tensorboard.add_scalar(f"best/{name}", value, step)
            self._add_hparams(hparams({}, {})[2])

    def _add_hparams(self, summary: typing.Any) -> None:
        self._tensorboard.file_writer.add_summary(summary)

    def record(self, name: str, value: float | torch.Tensor, *, reduce: str = "mean") -> None:
        """Adds a number, or a tensor with one element, to `name`, a path of words. Not collective, no GPU sync.

        `reduce`: over the steps since the last log step and over ranks: "mean", "sum", "max", or "last" (of rank 0).
        ValueError for a bad name, an unknown reduction or one that changed, a tensor of several elements.
        """
        if not _NAME.fullmatch(name) or reduce not in REDUCTIONS:
            expected = f"expected a path like train/loss and one of {REDUCTIONS}"
            raise ValueError(f"metric {name!r} with reduce={reduce!r}: {expected}")
        if self._reductions.setdefault(name, reduce) != reduce:
            raise ValueError(f"metric {name!r} was recorded with reduce={self._reductions[name]!r}, now {reduce!r}")
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(f"metric {name!r} got a tensor of shape {tuple(value.shape)}, expected one element")
            # A copy, because the caller may reuse its buffer.
            value = value.detach().reshape(()).to(torch.float64, copy=True)
        count = 1.0
        if name in self._windows and reduce != "last":
            before, count_before = self._windows[name]
            value, count = _max(before, value) if reduce == "max" else before + value, count_before + count
        self._windows[name] = value, count

    def log(self, step: int, epoch: float) -> dict[str, float]:
        """Reduces, writes (rank 0) and starts a new window. Collective: all ranks must have recorded the same names.

        It takes one all-gather, whatever the number of metrics, and a GPU sync. Returns name -> number, the same on
        every rank. RuntimeError on every rank if names or reductions differ, OSError on rank 0 if it cannot write.
        """
        names = sorted(self._windows)
        metrics = self._reduced(names)
        self._windows.clear()
        if self._rank == 0:
            self._write({"step": step, "epoch": epoch, "wall_time_s": time.time(), **metrics}, metrics)
            if self._progress is not None:
                self._progress.show(step, metrics)
        return metrics

    def _write(self, entry: dict[str, typing.Any], metrics: dict[str, float]) -> None:
        try:
            self._jsonl.write(json.dumps(json_safe(entry), allow_nan=False) + "\n")
            self._jsonl.flush()
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, entry["step"])
            self._tensorboard.flush()
            if self._mlflow is not None:
                self._mlflow.wake()
        except OSError as error:  # For an open file, the system's message does not name the file.
            self._has_failed = True
            raise OSError(f"metrics of step {entry['step']} were not written, {self._folder}: {error}") from error

    def sync(self) -> None:
        """Waits until all entries so far are on disk. Rank 0 only; from any thread."""
        for path in (self._folder / JSONL_NAME, *self._folder.glob(f"*{self._event_name}"), self._folder):
            sync(path)

    def _reduced(self, names: list[str]) -> dict[str, float]:
        """Reduces over ranks. Each sends float64 [checksum of its names, values, counts], padded to whole slots."""
        slots = _SLOTS * max(math.ceil(len(names) / _SLOTS), 1)
        checksum = zlib.crc32("|".join(f"{name} {self._reductions[name]}" for name in names).encode())
        message = torch.zeros(1 + 2 * slots, dtype=torch.float64, device=self._device)
        message[0] = checksum  # below 2^32: exact in float64
        if names:
            columns = zip(*(self._windows[name] for name in names), strict=True)
            message[1:].view(2, slots)[:, : len(names)] = torch.stack([_vector(c, self._device) for c in columns])
        messages = [message]
        if dist.is_initialized():
            messages = [torch.empty_like(message) for _ in range(dist.get_world_size())]
            dist.all_gather(messages, message)
        messages_RM = torch.stack(messages).cpu()
        different = (messages_RM[:, 0] != messages_RM[0, 0]).nonzero().flatten().tolist()
        if different:
            raise RuntimeError(f"ranks {different} recorded other metrics than rank 0; rank {self._rank} has {names}")
        values_RM, counts_RM = messages_RM[:, 1:].view(-1, 2, slots)[..., : len(names)].unbind(1)
        reduced = {
            "mean": values_RM.sum(0) / counts_RM.sum(0),
            "sum": values_RM.sum(0),
            "max": values_RM.amax(0),  # NaN wins
            "last": values_RM[0],
        }
        return {name: float(reduced[self._reductions[name]][i]) for i, name in enumerate(names)}

    def close(self, *, is_finished: bool = False) -> None:
        """Closes the files and the progress bar; values that were not logged are lost. Not collective."""
        if self._rank == 0:
            for file in (self._jsonl, self._tensorboard):
                # What could not be written fails here again, and would hide the error that says so.
                with contextlib.suppress(*[OSError] * self._has_failed):
                    file.close()
            if self._mlflow is not None:
                writer, self._mlflow = self._mlflow, None  # a second call finds it closed
                writer.close("FINISHED" if is_finished else "KILLED", *self._final)
        if self._progress is not None:
            self._progress.close(is_finished=is_finished)


def truncate_jsonl(path: pathlib.Path, last_step: int) -> None:
    """Removes entries of steps after `last_step` and a half-written last line, by rename; logs how many.

    ValueError if another line is not an entry of a run: then the file is not ours to rewrite.
    """
    check_place(path)
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            is_kept = json.loads(line)["step"] <= last_step
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                continue  # The run was killed while it wrote this line.
            found = f"{path}, line {number} is not an entry of a run ({error!r})"
            raise ValueError(f"{found}; move the file away") from error
        if is_kept:
            kept.append(line if line.endswith("\n") else line + "\n")
    if len(kept) < len(lines):
        removed = len(lines) - len(kept)
        _LOGGER.warning("%s: removed %d of %d entries, later than step %d", path, removed, len(lines), last_step)
    if kept != lines:
        write(path, "".join(kept).encode())


def _hparam(value: typing.Any) -> float | str:
    """Keeps what TensorBoard's hyperparameters can hold; the others become text."""
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _max(first, second):
    """Returns the larger one; NaN if one is NaN."""
    if not isinstance(first, torch.Tensor) and not isinstance(second, torch.Tensor):
        return math.nan if math.isnan(first) or math.isnan(second) else max(first, second)
    return torch.maximum(*(torch.as_tensor(value, dtype=torch.float64) for value in (first, second)))


def _vector(values: typing.Sequence, device: torch.device) -> torch.Tensor:
    """Builds a float64 vector on `device` from numbers and tensors, with two device copies instead of one per value."""
    vector = torch.tensor([0.0 if isinstance(v, torch.Tensor) else v for v in values], dtype=torch.float64).to(device)
    places = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor)]
    if places:
        vector[torch.tensor(places, device=device)] = torch.stack([values[i].to(device) for i in places])
    return vector
