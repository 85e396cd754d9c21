"""Measures the speed of training on this rank: rates over a sliding window, time spent waiting for data, memory.

It reads host clocks only, without GPU sync. On a GPU a single step then measures the enqueueing, but a window of many
steps is right, because the host cannot run ahead of the device for long.
"""

import collections
import contextlib
import math
import resource
import sys
import time
import typing

import torch

from gpsd_dist.metrics.recorder import Recorder

REDUCTIONS = {
    "perf/examples_per_s": "sum",
    "perf/tokens_per_s": "sum",
    "perf/step_ms": "mean",
    "perf/data_wait_share": "mean",
    "perf/tflops_per_s": "sum",
    "perf/mfu": "mean",
    "perf/cpu_s": "sum",
    "perf/peak_rss_gib": "max",
    "perf/peak_cuda_gib": "max",
}


class Throughput:
    """Counts steps of this rank. Call `restart` before the first step and after every pause (validation, saving)."""

    def __init__(
        self,
        window_steps: int = 50,
        clock: typing.Callable[[], float] = time.perf_counter,
        peak_flops_per_s: float | None = None,
    ):
        """Sets the window of the rates, in steps since the last pause; `clock` returns seconds.

        `peak_flops_per_s`: what the device can do; None, as for a CPU, gives no MFU, and NaN one that is NaN.
        """
        self._clock, self._peak = clock, peak_flops_per_s
        self._marks = collections.deque(maxlen=window_steps + 1)  # (time, examples, tokens, waited, FLOPs) cumulated
        self._examples = self._tokens = 0
        self._waited_s = self._flops = 0.0
        self._has_flops = False
        self.restart()

    def restart(self) -> None:
        """Empties the window, so that a pause since the last step enters no rate."""
        self._marks.clear()
        self.step(0, 0)

    @contextlib.contextmanager
    def data_wait(self) -> typing.Iterator[None]:
        """Times the block as waiting for the next batch."""
        start_s = self._clock()
        yield
        self._waited_s += self._clock() - start_s

    def step(self, num_examples_local: int, num_tokens_local: int, flops_local: float | None = None) -> None:
        """Counts a finished step with its real (not padded) examples, tokens and FLOPs on this rank.

        `flops_local` is 0 on a rank without rows and None where the model's FLOPs are not known, on all ranks.
        """
        self._examples += num_examples_local
        self._tokens += num_tokens_local
        self._flops += flops_local or 0.0
        self._has_flops |= flops_local is not None
        self._marks.append((self._clock(), self._examples, self._tokens, self._waited_s, self._flops))

    def rates(self) -> dict[str, float]:
        """Returns the metrics of this rank, keys of REDUCTIONS; rates are NaN before the first step after a pause.

        `perf/tflops_per_s` counts model FLOPs, where they are known (`metrics.flops`); `perf/mfu` is their share of the
        device's bf16 peak, whatever the run computes in. `perf/cpu_s` is user and system time of this process and its
        finished children since it began. Peaks are since the process began; `perf/peak_cuda_gib` only where CUDA is in
        use.
        """
        names = ("perf/examples_per_s", "perf/tokens_per_s", "perf/data_wait_share")
        steps = len(self._marks) - 1
        elapsed_s, *amounts, flops = (last - first for first, last in zip(self._marks[0], self._marks[-1]))
        metrics = {name: amount / elapsed_s if elapsed_s > 0 else math.nan for name, amount in zip(names, amounts)}
        metrics["perf/step_ms"] = 1000 * elapsed_s / steps if steps else math.nan
        if self._has_flops:
            flops_per_s = flops / elapsed_s if elapsed_s > 0 else math.nan
            metrics["perf/tflops_per_s"] = flops_per_s / 1e12
            if self._peak is not None:
                metrics["perf/mfu"] = flops_per_s / self._peak
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        metrics["perf/cpu_s"] = sum(usage.ru_utime + usage.ru_stime for usage in used)
        unit_bytes = 1 if sys.platform == "darwin" else 1024  # getrusage(2): ru_maxrss is in KiB on Linux
        metrics["perf/peak_rss_gib"] = used[0].ru_maxrss * unit_bytes / 2**30
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            metrics["perf/peak_cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def record_to(self, recorder: Recorder) -> None:
        """Records `rates`. Over ranks, rates and CPU time add up, times and shares are means, memory is a maximum."""
        for name, value in self.rates().items():
            recorder.record(name, value, reduce=REDUCTIONS[name])
