"""Measures where the time of a real training step goes, phase by phase, for one process or several, on a CPU or a GPU.

A phase's time is its own: what it calls that is another phase counts there, so the phases of a clock add up to the
step. Clocks:

CPU   of the thread that trains, on a CPU: what it computes. Standing still costs nothing.
GPU   between CUDA events on the stream of the step, on a GPU: computing, and waiting for the host or another stream.
wall  of the thread that trains. On a CPU it includes pauses while other programs have the core, and, in collectives,
      waiting for the slower ranks; on a GPU it is launching and waiting, as the host runs ahead.

Only the plain loop can be split: in TorchRec's pipeline the phases of neighbouring steps overlap.
"""

import contextlib
import dataclasses
import itertools
import time
import typing
import unittest.mock

import torch
import torch.distributed as dist

from benchmarks.tables import Table
from gpsd_dist import training_step as training_step_module
from gpsd_dist.trainer import Trainer

DATA_WAIT, H2D, LOOKUP, TOWER, LOSS = "data wait", "H2D", "lookup", "embed + tower", "head + loss"
BACKWARD, TABLES, CLIPPING, OPTIMIZER = "backward", "table backward + update", "clipping", "dense optimizer"
COLLECTIVES, REST = "collectives", "rest"
OTHER_THREADS = "other threads"
PHASES = (DATA_WAIT, H2D, LOOKUP, TOWER, LOSS, BACKWARD, TABLES, CLIPPING, OPTIMIZER, COLLECTIVES, REST)
_CALLS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_tensor",
)

Split: typing.TypeAlias = dict[str, dict[str, float]]  # clock -> phase -> milliseconds per step


def split_steps(trainer: Trainer, train: typing.Callable[[int], typing.Any], count: int) -> Split:
    """Averages the `count` steps of `trainer` that `train(count)` makes. Collective, if these steps are.

    H2D is `to_device`, which copies nothing on a CPU but walks through the batch. Collectives are calls of
    torch.distributed and waiting for them (counts, TorchRec's exchange of indices, rows and gradients, metrics), and
    what the backward still waits for when its last gradient is there: the rest of DDP's exchange.
    """
    log = _Log(_GpuClock() if trainer.runtime.device.type == "cuda" else _CpuClock())
    with _installed(log, trainer):
        train(count)
    return {
        clock: {phase: 1000 * seconds.get(phase, 0.0) / count for phase in PHASES}
        for clock, seconds in log.seconds().items()
    }


def split_table(title: str, splits: dict[str, Split]) -> Table:
    """Makes a row per name and clock."""
    table = Table(title, ("name", "clock", *PHASES, OTHER_THREADS))
    for name, split in splits.items():
        for clock, times in split.items():
            cells = (f"{times[phase]:.1f}" if phase in times else "" for phase in (*PHASES, OTHER_THREADS))
            table.add(name, clock, *cells)
    return table


class _CpuClock:
    names = ("CPU", "wall")

    def read(self) -> tuple[float, float]:
        return time.thread_time(), time.perf_counter()

    def between(self, begin: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
        return end[0] - begin[0], end[1] - begin[1]


class _GpuClock:
    names = ("GPU", "wall")

    def read(self) -> tuple[torch.cuda.Event, float]:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, time.perf_counter()

    def between(self, begin: tuple[torch.cuda.Event, float], end: tuple[torch.cuda.Event, float]):
        end[0].synchronize()
        return begin[0].elapsed_time(end[0]) / 1000, end[1] - begin[1]


class _Log:
    """Reads a clock wherever the phase changes. Nothing is computed before the end: no waiting for a GPU."""

    def __init__(self, clock: _CpuClock | _GpuClock):
        self._clock = clock
        self._stack = [REST]
        self._marks: list[tuple[str, typing.Any]] = [(REST, clock.read())]

    @property
    def phase_now(self) -> str:
        """Returns the innermost phase."""
        return self._stack[-1]

    def enter(self, phase: str) -> None:
        """Begins a phase that lasts until the surrounding `phase` ends."""
        self._stack.append(phase)
        self._mark()

    @contextlib.contextmanager
    def phase(self, name: str) -> typing.Iterator[None]:
        """Counts the block, without the phases inside it."""
        depth = len(self._stack)
        self.enter(name)
        try:
            yield
        finally:
            del self._stack[depth:]
            self._mark()

    def timed(self, function: typing.Callable, name: str) -> typing.Callable:
        """Wraps `function` as a phase."""

        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def seconds(self) -> dict[str, dict[str, float]]:
        """Adds up clock -> phase; ends the log."""
        self._mark()
        total: dict[str, dict[str, float]] = {name: {} for name in self._clock.names}
        for (phase, begin), (_, end) in itertools.pairwise(self._marks):
            for name, seconds in zip(self._clock.names, self._clock.between(begin, end), strict=True):
                total[name][phase] = total[name].get(phase, 0.0) + seconds
        return total

    def _mark(self) -> None:
        self._marks.append((self.phase_now, self._clock.read()))


@contextlib.contextmanager
def _installed(log: _Log, trainer: Trainer) -> typing.Iterator[None]:
    """Replaces what a step calls by the same, timed."""
    step, patch = trainer.training_step, unittest.mock.patch.object
    plain, optimizer, backbone = step.components, step.optimizer, step.model.backbone
    tables = _Timed(plain.tables, log.timed(plain.tables, LOOKUP))
    stage = _Timed(plain.stage, loss_sums=log.timed(plain.stage.loss_sums, LOSS))
    timed_components = dataclasses.replace(plain, tables=tables, stage=stage)
    clip, throughput = torch.nn.utils.clip_grad_norm_, trainer.metrics.throughput
    patches = [
        patch(step, "components", timed_components),
        patch(throughput, "data_wait", _timed_wait(log, throughput.data_wait)),
        patch(training_step_module, "to_device", log.timed(training_step_module.to_device, H2D)),
        *(patch(backbone, name, log.timed(getattr(backbone, name), TOWER)) for name in ("forward", "with_history")),
        patch(optimizer, "step", log.timed(optimizer.step, OPTIMIZER)),
        patch(torch.nn.utils, "clip_grad_norm_", log.timed(clip, CLIPPING)),
        patch(training_step_module._Joined, "backward", _timed_table_backward(log)),
        patch(torch.Tensor, "backward", _timed_backward(log)),
        # the class, not the object: TorchRec waits for nothing that is no `Work`
        patch(dist.Work, "wait", log.timed(dist.Work.wait, COLLECTIVES)),
        *(patch(dist, name, log.timed(getattr(dist, name), COLLECTIVES)) for name in _CALLS),
    ]
    with contextlib.ExitStack() as stack:
        for entry in patches:
            stack.enter_context(entry)
        yield


def _timed_wait(log: _Log, plain: typing.Callable[[], typing.ContextManager[None]]) -> typing.Callable:
    @contextlib.contextmanager
    def wait() -> typing.Iterator[None]:
        with plain(), log.phase(DATA_WAIT):
            yield

    return wait


def _timed_table_backward(log: _Log) -> typing.Callable:
    """Finds the autograd node between the gradients of the dense part and those of the tables: after it, only tables
    are left.
    """
    plain = training_step_module._Joined.backward

    def backward(ctx, *gradients):
        joined = plain(ctx, *gradients)
        log.enter(TABLES)
        return joined

    return staticmethod(backward)


def _timed_backward(log: _Log) -> typing.Callable:
    """DDP waits for its exchange in a callback at the end of the backward. Ours is queued by the first gradient of all,
    so it comes before that one: after it, only collectives are left.
    """
    plain = torch.Tensor.backward

    def call(tensor, *args, **kwargs):
        def at_first_gradient(_) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: log.enter(COLLECTIVES))

        with log.phase(BACKWARD):
            tensor.register_hook(at_first_gradient)
            plain(tensor, *args, **kwargs)

    return call


class _Timed:
    """Stands in for an object, with its call or some attributes replaced."""

    def __init__(self, wrapped: typing.Any, call: typing.Callable | None = None, **replaced: typing.Callable):
        self._wrapped, self._call, self._replaced = wrapped, call, replaced

    def __getattr__(self, name: str) -> typing.Any:
        return self._replaced.get(name) or getattr(self._wrapped, name)

    def __call__(self, *args, **kwargs) -> typing.Any:
        return (self._call or self._wrapped)(*args, **kwargs)
