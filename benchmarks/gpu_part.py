"""Measures one part of the GPU suite in a process of its own, which gpu_suite.py starts.

    python -m benchmarks.gpu_part MODULE:FUNCTION NAME gpu|toy OUT

Whatever goes wrong ends the process: the suite records its exit status and the end of what it wrote to stderr.
"""

import json
import pathlib
import pkgutil
import sys
import tempfile
import typing

import torch

from benchmarks.gpu_bench import SIZES, Bench, Sizes
from gpsd_dist.distributed.runtime import Runtime, process_group


def measure(function: str, name: str, sizes: Sizes, runtime: Runtime) -> dict[str, typing.Any]:
    """Calls MODULE:FUNCTION, imported only now, with a scratch folder; returns figures by name."""
    is_cuda = runtime.device.type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else "CPU"
    with tempfile.TemporaryDirectory(prefix="gpsd-gpu-") as folder:
        found = pkgutil.resolve_name(function)(Bench(sizes, runtime, pathlib.Path(folder)), name)
    return {"name": name, "device": device, "torch": torch.__version__} | found


if __name__ == "__main__":
    function, name, sizes, out = sys.argv[1:]
    with process_group(timeout_s=600) as runtime:
        pathlib.Path(out).write_text(json.dumps(measure(function, name, SIZES[sizes], runtime)))
