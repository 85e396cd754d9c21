"""Measures how step time grows with rows, batch, history length, candidates and processes, beside what is expected.

Exponents are least-squares slopes of log(time) over log(size). The expected ones come out of the same fit on what
should cause the time: tokens for batch and candidates, FLOPs of the tower for lengths, nothing for rows, of which a
step touches a few thousand however many there are.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import typing

import numpy as np
import torch

from benchmarks.datasets import SOURCES, BenchData, Constant, Source, prepare_synthetic
from benchmarks.product import Product, run_config
from benchmarks.remote import interleave, running
from benchmarks.sides import SIZES, SideSpec
from benchmarks.step_split import Split, split_table
from benchmarks.tables import Table
from gpsd_dist.config import PretrainConfig
from gpsd_dist.distributed.runtime import process_group
from gpsd_dist.model.transformer import ffn_width
from gpsd_dist.plan.workload import expected_distinct
from gpsd_dist.schema import read_manifest

SWEEPS = {
    "growth/rows": (100_000, 1_000_000, 10_000_000),
    "growth/batch": (128, 256, 512, 1024),
    "growth/length": (10, 20, 40, 80, 160),
    "growth/candidates": (1, 2, 4, 8, 16),
    "growth/processes": (1, 2),
}
_PLANNED_ROWS = 100_000_000  # 25 GiB at width 64: does not fit here
_SIZE = SIZES["h64"]
_ROUNDS = (3, 5)
_STEPS = 20  # of a weak-scaling run, after as many to warm up, and of its split


@dataclasses.dataclass(frozen=True)
class _Point:
    """Describes one size of a sweep."""

    size: int
    spec: SideSpec
    cause: float  # what the time should be proportional to


def measure(name: str, seconds: float, data_root: pathlib.Path, folder: pathlib.Path) -> list[dict]:
    """Measures one entry per size; each has the exponent of its sweep."""
    if name == "growth/processes":
        return _weak_scaling(name, folder)
    points = [_point(name, size, folder) for size in SWEEPS[name]]
    with running({str(point.size): point.spec for point in points}) as sides:
        blocks = interleave(sides, seconds, shortest_s=1.0, rounds=_ROUNDS)
    times = [statistics.median(block.step_cpu_ms for block in blocks[str(point.size)]) for point in points]
    sizes = [point.size for point in points]
    found, expected = exponent(sizes, times), exponent(sizes, [point.cause for point in points])
    entries: list[dict] = [
        {"name": name, "size": point.size, "step_cpu_ms": step_ms, "exponent": found, "expected": expected}
        for point, step_ms in zip(points, times, strict=True)
    ]
    if name == "growth/rows":
        entries += [_planned(name, rows) for rows in (*SWEEPS[name], _PLANNED_ROWS)]
    return entries


def exponent(sizes: typing.Sequence[float], values: typing.Sequence[float]) -> float:
    """Fits the slope of log(values) over log(sizes)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _point(name: str, size: int, folder: pathlib.Path) -> _Point:
    sweep = name.split("/")[1]
    source, candidates, batch_rows = SOURCES["grocery"], 1, 512
    if sweep == "rows":
        source = dataclasses.replace(source, num_items=size - 2)
    elif sweep == "batch":
        batch_rows = size
    elif sweep == "length":
        batch_rows = 128
        source = dataclasses.replace(source, max_history_length=size, draw_lengths=Constant(size), num_rows=2048)
    else:
        candidates, batch_rows = size, 256
    data = _rows(f"{sweep}-{size}", source, candidates, folder)
    tokens = data.manifest.split("train").num_history_tokens / data.manifest.split("train").num_rows
    cause = {
        "rows": 1.0,
        "batch": float(batch_rows),
        "length": _tower_flops(tokens),
        "candidates": tokens + candidates,
    }[sweep]
    return _Point(size, SideSpec("product", data, _SIZE, batch_rows, folder / f"run-{sweep}-{size}"), cause)


def _rows(name: str, source: Source, candidates: int, folder: pathlib.Path) -> BenchData:
    return prepare_synthetic("discriminative", name, source, candidates, folder)


def _tower_flops(length: float) -> float:
    """Counts FLOPs per request: linear layers and causal attention."""
    layer = 4 * _SIZE.width**2 + 3 * _SIZE.width * ffn_width(_SIZE.width)
    return 6 * length * layer + 12 * _SIZE.width * length * (length + 1) / 2


def _planned(name: str, rows: int) -> dict:
    """Computes memory of the table and the rows that a step touches, by arithmetic."""
    touched = expected_distinct(rows, 512 * 10)
    return {
        "name": f"{name}, planned",
        "size": rows,
        "table_gib": rows * _SIZE.width * 4 / 2**30,
        "optimizer_gib": rows * 4 / 2**30,
        "rows_per_step": touched,
    }


def _weak_scaling(name: str, folder: pathlib.Path) -> list[dict]:
    """Trains 512 requests per process; real requests per second of wall time, runs of 1 and 2 processes in turn."""
    data = _rows("processes", SOURCES["grocery"], 1, folder)
    facts = {"data_dir": str(data.data_dir), "split": data.split, "note": data.note}
    (folder / "data.json").write_text(json.dumps(facts))
    rates: dict[int, list[dict]] = {count: [] for count in SWEEPS[name]}
    for turn in range(_ROUNDS[0]):
        for count in SWEEPS[name]:
            rates[count].append(_scaling_run(count, folder, turn))
    entries = []
    for count, found in rates.items():
        middle: dict = {key: statistics.median(run[key] for run in found) for key in found[0] if key != "step_split_ms"}
        middle["step_split_ms"] = _middle_split([run["step_split_ms"] for run in found])
        speed = statistics.median(
            run["requests_per_s"] / one["requests_per_s"] for run, one in zip(found, rates[1], strict=True)
        )
        entries.append({"name": name, "size": count, "efficiency": speed / count, "cores": os.cpu_count()} | middle)
    return entries


def _middle_split(splits: list[Split]) -> Split:
    """Computes the median of every phase."""
    return {
        clock: {phase: statistics.median(split[clock][phase] for split in splits) for phase in times}
        for clock, times in splits[0].items()
    }


def _scaling_run(count: int, folder: pathlib.Path, turn: int) -> dict:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += ["-m", "benchmarks.growth", str(folder), str(turn)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    subprocess.run([sys.executable, *command], check=True, env=environment, capture_output=True)
    return json.loads((folder / f"scaling-{count}-{turn}.json").read_text())


def _scaling_rank(folder: pathlib.Path, turn: str) -> None:
    """Runs under torchrun: all ranks train, rank 0 writes what it saw. Collective."""
    torch.set_num_threads(1)
    facts = json.loads((folder / "data.json").read_text())
    data_dir = pathlib.Path(facts["data_dir"])
    data = BenchData(data_dir, read_manifest(data_dir), facts["split"], SOURCES["grocery"], facts["note"])
    with process_group(timeout_s=300) as runtime:
        world = runtime.world_size
        rows = 512 * world
        run = run_config(data, _SIZE, rows, PretrainConfig(), folder / f"scaling-run-{world}-{turn}")
        product = Product(run, runtime)
        product.run_steps(_STEPS)
        begin, cpu_s = time.perf_counter(), time.process_time()
        product.run_steps(_STEPS)
        wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_s
        split = product.split_step(_STEPS)
        if runtime.is_main:
            found: dict = {"requests_per_s": rows * _STEPS / wall_s, "step_wall_ms": 1000 * wall_s / _STEPS}
            found |= {"step_cpu_ms": 1000 * cpu_s / _STEPS, "step_split_ms": split}
            (folder / f"scaling-{world}-{turn}.json").write_text(json.dumps(found))
        product.close()


def tables(entries: list[dict]) -> list[Table]:
    """Makes tables of sweeps, planned sizes and weak scaling."""
    sweep = Table("Step time against size (L4H64A4, ranking)", ("name", "sizes", "CPU ms", "exponent", "expected"))
    planned = Table(
        "Rows that are planned, not trained", ("rows", "table", "row-wise Adagrad", "rows that a step touches")
    )
    weak = Table(
        "Weak scaling: 512 requests per process",
        ("processes", "requests / s", "step, wall ms", "step, CPU ms of rank 0", "efficiency"),
    )
    for name in dict.fromkeys(entry["name"] for entry in entries if "exponent" in entry):
        chosen = [entry for entry in entries if entry["name"] == name]
        sweep.add(
            name,
            ", ".join(f"{entry['size']:,}" for entry in chosen),
            ", ".join(f"{entry['step_cpu_ms']:.0f}" for entry in chosen),
            f"**{chosen[0]['exponent']:.2f}**",
            f"{chosen[0]['expected']:.2f}",
        )
    for entry in entries:
        if "table_gib" in entry:
            planned.add(
                f"{entry['size']:,}",
                f"{entry['table_gib']:.2f} GiB",
                f"{entry['optimizer_gib']:.2f} GiB",
                f"{entry['rows_per_step']:,.0f}",
            )
        if "efficiency" in entry:
            weak.add(
                f"{entry['size']} on {entry['cores']} cores",
                f"{entry['requests_per_s']:,.0f}",
                f"{entry['step_wall_ms']:.0f}",
                f"{entry['step_cpu_ms']:.0f}",
                f"{entry['efficiency']:.0%}",
            )
    splits = {f"processes: {entry['size']}": entry["step_split_ms"] for entry in entries if "efficiency" in entry}
    split = split_table("Weak scaling: phases of a step of rank 0, ms", splits)
    return [table for table in (sweep, planned, weak, split) if table.rows]


if __name__ == "__main__":
    _scaling_rank(pathlib.Path(sys.argv[1]), sys.argv[2])
