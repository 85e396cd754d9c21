"""Describes a run in its folder: options, table layout, command, commit, versions, hardware."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import platform
import subprocess
import sys
import typing

import torch

from gpsd_dist.checkpoint import storage
from gpsd_dist.config.model import plugin_file, size_text
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.plan.frozen import expected_rows, frozen_line
from gpsd_dist.tables.sharding import Cluster
from gpsd_dist.trainer import Trainer

log = logging.getLogger(__name__)
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy", "gin-config")


def write(gin_text: str, trainer: Trainer, runtime: Runtime) -> None:
    """Writes four files into OUTPUT_DIR, and a short form to the log. Only rank 0 may call it.

    config.gin is for running the command again, run_config.json has every option, plan.txt the layout of the tables and
    what freezing them saves, environment.json the command, commit, versions and hardware, and the user's file of
    models, if there is one.
    """
    run = trainer.run
    folder = pathlib.Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tables = trainer.components.tables
    facts = environment(runtime)
    if trainer.start is not None:
        _compare_plugins(folder / "environment.json", facts)
    plan = [*tables.plan.splitlines(), *([_saved_by_freezing(trainer, runtime)] if run.frozen_tables else [])]
    texts = {
        "config.gin": gin_text,
        "run_config.json": json.dumps(dataclasses.asdict(run), indent=1),
        "plan.txt": "\n".join(plan) + "\n",
        "environment.json": json.dumps(facts, indent=1),
    }
    # Every file is replaced whole or not at all: run_config.json says where the checkpoints are.
    for name, text in texts.items():
        storage.write(folder / name, text.encode())
    sparse = sum(weight.size()[0] * tables.width for weight in tables.weights().values())
    dense = sum(parameter.numel() for parameter in trainer.model.parameters())
    devices = f"{runtime.world_size} x {runtime.device.type}"
    model = f"{run.model.name} {size_text(dataclasses.asdict(run.model))}"
    log.info("run %s: %s %s, %s on %s", folder, run.stage, run.strategy, model, devices)
    log.info("parameters: %s in tables, %s dense", f"{sparse:,}", f"{dense:,}")
    for line in plan:
        log.info("%s", line)
    epochs = f"{trainer.loader.steps_per_epoch} per epoch x {run.train.epochs} epochs"
    log.info("steps: %s, %d in all, warm-up %d", epochs, trainer.total_steps, trainer.warmup_steps)


def _saved_by_freezing(trainer: Trainer, runtime: Runtime) -> str:
    """Says in one line what freezing the transferred tables saves in memory and traffic."""
    run, manifest, components = trainer.run, trainer.manifest, trainer.components
    rows = expected_rows(run, manifest, components.lookup_names, runtime.world_size)
    cluster = Cluster(runtime.world_size, runtime.local_world_size, runtime.device.type)
    return frozen_line(run, manifest, components.tables.shards, rows, cluster)


def environment(runtime: Runtime) -> dict[str, typing.Any]:
    """Collects facts for `environment.json`, which JSON can hold."""
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
        **_plugin(),
    }


def _plugin() -> dict[str, str | None]:
    """Returns path and sha256 of the user's file that registered the model; nothing if the model is one of ours."""
    path = plugin_file()
    if path is None:
        return {}
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # moved since it was imported
        digest = None
    return {"plugin": str(path), "plugin_sha256": digest}


def _compare_plugins(described: pathlib.Path, facts: dict[str, typing.Any]) -> None:
    """Warns if a resumed run goes on with another file of models than the one that began it. Of rank 0 alone."""
    try:
        before = storage.read_json(described)
    except (ValueError, OSError):  # what describes a run decides nothing
        return
    if before.get("plugin_sha256") not in (None, facts.get("plugin_sha256")):
        log.warning(
            "%s has changed since this run was begun (with %s): the model may compute something else than its weights "
            "were trained for",
            facts.get("plugin"),
            before.get("plugin"),
        )


def _commit() -> str | None:
    """Returns the commit of the source tree, with "+changes" if it is edited; None outside git."""
    root = pathlib.Path(__file__).resolve().parents[1]
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        results = [subprocess.run(c, cwd=root, capture_output=True, text=True, timeout=10) for c in commands]
    except (OSError, subprocess.TimeoutExpired):
        return None
    if any(result.returncode for result in results):
        return None
    return results[0].stdout.strip() + ("+changes" if results[1].stdout.strip() else "")
