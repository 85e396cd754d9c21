"""A long run of two ranks: memory, open files and threads of every process, as slopes with bounds.

Resident memory also moves because freed pages lie between used ones. So what a rank has allocated is watched, too: what
malloc and Arrow have given out, and blocks of Python's own allocator, at each validation, when garbage was
collected. A leak shows in one of them.

`python -m tests.faults.run --soak [MINUTES]` runs it after the faults; `python -m tests.faults.soak MINUTES` alone.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
import statistics
import sys
import tempfile
import threading
import time

import numpy as np

from gpsd_dist.distributed import exit_codes
from tests.faults.jobs import Run, Workshop

WARM_UP = 0.4  # of the time: allocators and caches fill
SAMPLE_S = 2.0
MAX_MB_PER_1000_STEPS = 0.5  # in the second part: 36 bytes a step and row would be a leak of 1 MB in 1000 steps here
MAX_PER_1000_STEPS = {"used_mb": 0.1, "arrow_mb": 0.1, "blocks": 1000.0}  # 100 bytes, one block a step
_OPTIONS = ("--gin.EPOCHS=1000000", "--gin.PATIENCE=0", "--gin.TrainConfig.log_interval_steps=5")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One look at a process."""

    time_s: float
    step: int
    memory_mb: float
    num_files: int
    num_threads: int


def main(minutes: float) -> bool:
    """Runs the soak, prints a line per process, and returns whether all bounds were kept."""
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        run = Run(Workshop(pathlib.Path(folder)), "soak")
        heaps = run.folder / "heaps"
        heaps.mkdir()
        job = run.start(None, *_OPTIONS, env={"HEAP": str(heaps)})
        last_lines = collections.deque[str](maxlen=20)  # a pipe that nobody reads would stop the job
        threading.Thread(target=last_lines.extend, args=(job.stderr,), daemon=True).start()
        samples: dict[str, list[Sample]] = {}
        end_s = time.monotonic() + 60 * minutes
        while time.monotonic() < end_s:
            time.sleep(SAMPLE_S)
            assert job.poll() is None, "".join(last_lines)
            step = _step(run.output / "metrics.jsonl")
            for name, pid in _processes(job.pid).items():
                if step:
                    samples.setdefault(name, []).append(_look(pid, step))
        job.terminate()
        assert job.wait(timeout=120) == exit_codes.STOPPED, "".join(last_lines)
        are_kept = [_judged(name, found) for name, found in samples.items()]
        are_kept += [_is_heap_flat(path) for path in sorted(heaps.iterdir())]
    return all(are_kept)


def _processes(launcher: int) -> dict[str, int]:
    children = pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for pid in children:
        found = re.search(rb"\0RANK=(\d+)\0", b"\0" + pathlib.Path(f"/proc/{pid}/environ").read_bytes())
        if found:
            ranks[f"rank {int(found[1])}"] = int(pid)
    return {"launcher": launcher} | dict(sorted(ranks.items()))


def _step(metrics: pathlib.Path) -> int:
    lines = metrics.read_bytes()[-5000:].splitlines() if metrics.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 2 else 0


def _look(pid: int, step: int) -> Sample:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    memory_kb, threads = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
    files = len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(time.monotonic(), step, memory_kb / 1024, files, threads)


def _judged(name: str, samples: list[Sample]) -> bool:
    """Prints what a process did after its warm-up, and returns whether that is within the bounds."""
    first, last = samples[0], samples[-1]
    late = [sample for sample in samples if sample.time_s > first.time_s + WARM_UP * (last.time_s - first.time_s)]
    parts = (samples, late, late[len(late) // 2 :])
    slopes = [_slope([sample.step for sample in part], [sample.memory_mb for sample in part]) for part in parts]
    files, threads = ([getattr(sample, what) for sample in late] for what in ("num_files", "num_threads"))
    grown = [statistics.median(values[-10:]) - statistics.median(values[:10]) for values in (files, threads)]
    is_good = slopes[1] <= MAX_MB_PER_1000_STEPS and max(grown) <= 0
    print(
        f"soak, {name}: {last.step} steps in {(last.time_s - first.time_s) / 60:.0f} min; memory {first.memory_mb:.1f} "
        f"to {last.memory_mb:.1f} MB, {slopes[0]:+.3f} MB per 1000 steps, {slopes[1]:+.3f} after the warm-up (at most "
        f"{MAX_MB_PER_1000_STEPS}), {slopes[2]:+.3f} in the last part; {files[-1]} open files ({grown[0]:+.0f}), "
        f"{threads[-1]} threads ({grown[1]:+.0f}): {'kept' if is_good else 'NOT KEPT'}",
        flush=True,
    )
    return is_good


def _is_heap_flat(heap: pathlib.Path) -> bool:
    """Prints what a rank has allocated per 1000 steps, and returns whether that is within the bounds."""
    lines = [json.loads(line) for line in heap.read_text().splitlines()]
    late = lines[int(WARM_UP * len(lines)) :]
    steps = [line.pop("step") for line in late]
    slopes = {what: _slope(steps, [line[what] for line in late]) for what in late[0]}
    is_good = all(slope <= MAX_PER_1000_STEPS.get(what, math.inf) for what, slope in slopes.items())
    found = ", ".join(f"{what} {late[-1][what]:.1f} ({slope:+.3f})" for what, slope in slopes.items())
    print(
        f"soak, {heap.name}: allocated at {len(late)} validations, and per 1000 steps: {found}: "
        f"{'kept' if is_good else 'NOT KEPT'}",
        flush=True,
    )
    return is_good


def _slope(steps: list[int], values: list[float]) -> float:
    """What `values` gain per 1000 steps, by least squares."""
    return float(np.polyfit(np.array(steps) / 1000, values, 1)[0]) if np.ptp(steps) else 0.0


if __name__ == "__main__":
    sys.exit(0 if main(float(sys.argv[1])) else 1)
