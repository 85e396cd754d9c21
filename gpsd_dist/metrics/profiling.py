"""Profiles three training steps on request: a Chrome trace, and a page of text that says where the time goes.

When profiling is off, `range` only tells the watchdog. Profiling does not change a bit of the weights.
"""

import contextlib
import functools
import logging
import pathlib
import secrets
import typing

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from gpsd_dist.config import RunConfig
from gpsd_dist.disk.writing import write
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.throughput import Throughput

log = logging.getLogger(__name__)
FIRST_STEP, LAST_STEP = 10, 12
"""Steps of this process, from 1. The first ones allocate, tune and fill caches; step 9 warms the profiler up."""
STEP, DATA_WAIT, FORWARD, TOWER, COLLECTIVES = "train step", "data wait", "forward", "tower", "small collectives"
LOOKUP, BACKWARD, OPTIMIZER = "table lookup", "backward + table update", "optimizer"
_RANGES = (STEP, DATA_WAIT, FORWARD, TOWER, COLLECTIVES, LOOKUP, BACKWARD, OPTIMIZER)
_COLLECTIVE_PREFIXES = ("gloo:", "nccl:")  # of the process groups' own ranges, from call to completion
_PIPELINE_BACKWARD = "## backward"  # TorchRec's pipeline opens this range around its call of backward
_WITH_COLLECTIVES = (COLLECTIVES, LOOKUP, BACKWARD)
_TOP_OPS = 20
_NOTHING = contextlib.nullcontext()


class StepProfiler:
    """Profiles one rank. Call `start` before the first step, `after_step` after each, `close` at the end."""

    def __init__(self, run: RunConfig, runtime: Runtime, model: nn.Module):
        """`model`: its backbone's `forward` and `with_history` get the range `TOWER` while profiling."""
        self._folder, self._is_on = pathlib.Path(run.output_dir) / "profile", run.train.profile
        self._rank, self._device, self._backbone = runtime.rank, runtime.device, getattr(model, "backbone", None)
        self._watchdog = runtime.watchdog
        self._methods = [name for name in ("forward", "with_history") if hasattr(self._backbone, name)]
        self._steps = 0
        self._profile: profile | None = None

    def range(self, name: str) -> typing.ContextManager[typing.Any]:
        """Names the block in the trace, in the summary, and to the watchdog."""
        self._watchdog.note(name, is_collective=name in _WITH_COLLECTIVES)
        return record_function(name) if self._profile is not None else _NOTHING

    def start(self) -> None:
        """Starts the profiler if TrainConfig.profile asks for it."""
        if not self._is_on:
            return
        for method in self._methods:
            setattr(self._backbone, method, _ranged(getattr(self._backbone, method), TOWER))
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])
        steps = LAST_STEP - FIRST_STEP + 1
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=FIRST_STEP - 2, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def after_step(self) -> None:
        """Counts a step; after `LAST_STEP` it writes the files and turns itself off."""
        if self._profile is None:
            return
        self._steps += 1
        self._profile.step()
        if self._steps == LAST_STEP:
            self._stop()

    def close(self) -> None:
        """Warns if the run ended before there was something to write."""
        if self._profile is not None:
            log.warning("TrainConfig.profile: the run ended after %d steps, before step %d", self._steps, LAST_STEP)
            self._stop()

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self._profile = None
        for method in self._methods:
            delattr(self._backbone, method)  # the class's own again

    def _write(self, recorded: profile) -> None:
        if self._steps < LAST_STEP:
            return  # The run ended early; the files would claim more steps than were recorded.
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{secrets.token_hex(8)}.json.gz"  # torch opens by name: nobody shall lay a link there
        recorded.export_chrome_trace(str(aside))
        aside.replace(folder / f"trace_rank{self._rank}.json.gz")
        peaks = {name: value for name, value in Throughput().rates().items() if name.startswith("perf/peak")}
        text = summary(list(recorded.key_averages()), self._rank, LAST_STEP - FIRST_STEP + 1, peaks)
        write(folder / f"summary_rank{self._rank}.txt", text.encode())
        log.info("profile of steps %d to %d: %s", FIRST_STEP, LAST_STEP, folder)


def summary(averages: list, rank: int, num_steps: int, peaks: dict[str, float]) -> str:
    """Writes one page of text. `averages`: entries of `key_averages()`; `peaks`: name -> GiB."""
    host = {entry.key: entry for entry in averages if entry.device_type == DeviceType.CPU}
    spent_ms = {name: entry.cpu_time_total / 1000 / num_steps for name, entry in host.items()}
    total_ms = spent_ms.get(STEP, 0.0) + spent_ms.get(DATA_WAIT, 0.0)
    forward_ms, tower_ms = spent_ms.get(FORWARD, 0.0), spent_ms.get(TOWER, 0.0)
    parts = {
        DATA_WAIT: spent_ms.get(DATA_WAIT, 0.0),
        LOOKUP: spent_ms.get(LOOKUP, 0.0),
        TOWER: tower_ms,
        "head + loss": forward_ms - tower_ms,
        **{name: spent_ms.get(name, 0.0) for name in (BACKWARD, OPTIMIZER, COLLECTIVES)},
    }
    parts[BACKWARD] += sum(ms for name, ms in spent_ms.items() if name.startswith(_PIPELINE_BACKWARD))
    parts["rest"] = total_ms - sum(parts.values())
    waiting_ms = sum(ms for name, ms in spent_ms.items() if name.startswith(_COLLECTIVE_PREFIXES))
    lines = [
        f"rank {rank}, mean of {num_steps} steps ({FIRST_STEP} to {LAST_STEP} of this process), recorded with overhead",
        "host time; on a GPU that is launching and waiting, see the CUDA columns and the trace",
        "",
        f"{'part':<28}{'ms/step':>10}{'share':>8}",
        *(_share(name, ms, total_ms) for name, ms in parts.items()),
        _share("all", total_ms, total_ms),
        "",
        _share("collectives, all together", waiting_ms, total_ms),
        "  from call to completion, so they overlap with each other and with the parts above",
        "",
        *(f"{name.removeprefix('perf/')}: {gib:.3f} since the process began" for name, gib in peaks.items()),
        "",
    ]
    for title, attribute in (("self CPU", "self_cpu_time_total"), ("self CUDA", "self_device_time_total")):
        lines += _top(averages, title, attribute, num_steps)
    return "\n".join(lines) + "\n"


def _share(name: str, milliseconds: float, total_ms: float) -> str:
    return f"{name:<28}{milliseconds:>10.2f}{milliseconds / total_ms if total_ms else 0:>8.1%}"


def _top(averages: list, title: str, attribute: str, num_steps: int) -> list[str]:
    """Lists the operations with the largest sums, without our ranges; empty if all are 0 (CUDA times on a CPU)."""
    operations = [entry for entry in averages if entry.key not in _RANGES and not entry.key.startswith("ProfilerStep")]
    ordered = sorted(operations, key=lambda entry: -getattr(entry, attribute))
    used = [entry for entry in ordered[:_TOP_OPS] if getattr(entry, attribute) > 0]
    if not used:
        return []
    heading = f"{'operation':<60}{'calls/step':>12}{title + ', ms/step':>20}"
    rows = [
        f"{entry.key[:58]:<60}{entry.count / num_steps:>12.1f}{getattr(entry, attribute) / 1000 / num_steps:>20.3f}"
        for entry in used
    ]
    return [heading, *rows, ""]


def _ranged(function: typing.Callable, name: str) -> typing.Callable:
    @functools.wraps(function)
    def call(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call
