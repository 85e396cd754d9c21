"""What a run was made with: command, commit, versions, hardware."""

import importlib.metadata
import pathlib
import platform
import subprocess
import sys
import typing

import torch

from gpsd_dist.distributed.runtime import Runtime

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy", "gin-config")


def environment(runtime: Runtime) -> dict[str, typing.Any]:
    """JSON-able facts for `environment.json`."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    is_cuda = runtime.device.type == "cuda"
    return {
        "argv": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "world_size": runtime.world_size,
        "device": torch.cuda.get_device_name(runtime.device) if is_cuda else platform.processor() or "cpu",
        "threads_per_rank": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Commit of the source tree, "+changes" if it is edited; None outside git."""
    root = pathlib.Path(__file__).resolve().parents[1]
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        results = [subprocess.run(c, cwd=root, capture_output=True, text=True, timeout=10) for c in commands]
    except (OSError, subprocess.TimeoutExpired):
        return None
    if any(result.returncode for result in results):
        return None
    return results[0].stdout.strip() + ("+changes" if results[1].stdout.strip() else "")
