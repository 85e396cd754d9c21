"""Speed of training on this rank: rates over a sliding window, time spent waiting for data, memory, MFU.

Host clocks only, no GPU synchronisation: on a GPU single steps are enqueue times, but a window of many steps is right
because the host cannot run ahead of the device for long.
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
from gpsd_dist.model.transformer import ffn_width

REDUCTIONS = {
    "perf/examples_per_s": "sum",
    "perf/tokens_per_s": "sum",
    "perf/step_ms": "mean",
    "perf/data_wait_share": "mean",
    "perf/cpu_s": "sum",
    "perf/peak_rss_gib": "max",
    "perf/peak_cuda_gib": "max",
}
# Dense bf16 peak by part of the device name, NVIDIA data sheets (without sparsity).
_PEAK_BF16_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


class Throughput:
    """Counts steps of this rank. Call `restart` before the first step and after every pause (validation, saving)."""

    def __init__(self, window_steps: int = 50, clock: typing.Callable[[], float] = time.perf_counter):
        """Rates cover the last `window_steps` steps since the last pause; `clock` returns seconds."""
        if window_steps < 1:
            raise ValueError(f"window_steps is {window_steps}, expected at least 1")
        self._clock = clock
        self._marks = collections.deque(maxlen=window_steps + 1)  # (time, examples, tokens, waited) cumulated
        self._examples = self._tokens = 0
        self._waited_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets the window: what happened since the last step is a pause and counts for no rate."""
        self._marks.clear()
        self._mark()

    @contextlib.contextmanager
    def data_wait(self) -> typing.Iterator[None]:
        """Times the block as waiting for the next batch."""
        start_s = self._clock()
        yield
        self._waited_s += self._clock() - start_s

    def step(self, num_examples_local: int, num_tokens_local: int) -> None:
        """One step is over; counts are real (not padded) examples and tokens of this rank, known on the host."""
        self._examples += num_examples_local
        self._tokens += num_tokens_local
        self._mark()

    def _mark(self) -> None:
        self._marks.append((self._clock(), self._examples, self._tokens, self._waited_s))

    def rates(self) -> dict[str, float]:
        """Metrics of this rank, keys of REDUCTIONS; rates are NaN before the first step after a pause.

        `perf/cpu_s` is user and system time of this process and its finished children since it began. Peaks are since
        the process began; `perf/peak_cuda_gib` only where CUDA is in use.
        """
        names = ("perf/examples_per_s", "perf/tokens_per_s", "perf/data_wait_share")
        steps = len(self._marks) - 1
        elapsed_s, *amounts = (last - first for first, last in zip(self._marks[0], self._marks[-1]))
        metrics = {name: amount / elapsed_s if elapsed_s > 0 else math.nan for name, amount in zip(names, amounts)}
        metrics["perf/step_ms"] = 1000 * elapsed_s / steps if steps else math.nan
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        metrics["perf/cpu_s"] = sum(usage.ru_utime + usage.ru_stime for usage in used)
        unit_bytes = 1 if sys.platform == "darwin" else 1024  # getrusage(2): ru_maxrss is in KiB on Linux
        metrics["perf/peak_rss_gib"] = used[0].ru_maxrss * unit_bytes / 2**30
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            metrics["perf/peak_cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def record_to(self, recorder: Recorder) -> None:
        """Records `rates`: rates and CPU time as sums over ranks, times and shares as means, memory as the largest."""
        for name, value in self.rates().items():
            recorder.record(name, value, reduce=REDUCTIONS[name])


def flops_per_token(
    num_layers: int, width: int, mean_context: float, *, num_negatives: int = 0, vocabulary: int = 0
) -> float:
    """Forward and backward FLOPs per real token: 6 L P + 12 L H c + 6 N H + 6 V H, with P = 4 H^2 + 3 H F.

    `mean_context` c is the mean number of tokens that a token attends to. `num_negatives` N per token for a sampled
    softmax, `vocabulary` V for a full one. The usual count, PaLM (arXiv:2204.02311) appendix B, with attention counted
    as causal; recomputation does not count.
    """
    parameters_per_layer = 4 * width**2 + 3 * width * ffn_width(width)
    per_layer = 6 * parameters_per_layer + 12 * width * mean_context
    return num_layers * per_layer + 6 * (num_negatives + vocabulary) * width


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation in [0, 1]: all three for the same set of devices (tokens of all ranks: sum of peaks)."""
    return tokens_per_s * flops_per_token / peak_flops_per_s


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by its name (`torch.cuda.get_device_name`); None if it is not listed."""
    words = device_name.upper().replace("-", " ").split()
    return next((peak for part, peak in _PEAK_BF16_FLOPS.items() if part in words), None)
