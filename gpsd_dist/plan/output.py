"""Makes the plan that `python -m gpsd_dist.plan` prints: the scenario from its options, tables, verdict, JSON."""

import argparse
import dataclasses
import json
import math
import typing

import numpy as np
import rich.table

from gpsd_dist.checkpoint.resume import saved_numbers
from gpsd_dist.config import RunConfig
from gpsd_dist.config.from_data import resolve
from gpsd_dist.data.run_manifest import read_run_manifest, with_data_version
from gpsd_dist.disk.console import Console
from gpsd_dist.disk.writing import write
from gpsd_dist.distributed.runtime import quiet_libraries
from gpsd_dist.plan.estimate import RESERVE, Estimate, Scenario, estimate
from gpsd_dist.plan.suggestions import Suggestion, suggestions
from gpsd_dist.plan.workload import data_shape, with_assumptions, with_table_rows
from gpsd_dist.preflight import check_options_against_data
from gpsd_dist.tables.sharding import Cluster, readable

_GIB, _MIB = 2**30, 2**20
_MIN_WIDTH = 110  # columns of the tables, also where the output goes to a log file


def make_plan(run: RunConfig, args: argparse.Namespace) -> bool:
    """Prints the plan, and writes it to `args.json`. Returns whether the run fits; ValueError for mistakes."""
    quiet_libraries()
    scenario = make_scenario(run, args)
    found = estimate(scenario)
    options = [] if found.fits else suggestions(scenario, found)
    _print(scenario, found, options)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(as_dict(scenario, found, options), indent=1, default=np.ndarray.tolist)
        write(args.json, f"{text}\n".encode())
    return found.fits


def make_scenario(run: RunConfig, args: argparse.Namespace) -> Scenario:
    """Reads the data, and applies what the options assume. ValueError if they do not fit."""
    table_rows = _sizes(args.table_rows)
    run = with_data_version(run)
    measured = read_run_manifest(run)
    # A refit trains with the numbers of the run that it repeats, and not with those of the data as they are now.
    run, chosen = resolve(run, measured, saved_numbers(run, None))
    check_options_against_data(run, measured)
    shape = data_shape(run, measured, run.training_split)
    if args.mean_history is not None and not 1 <= args.mean_history <= run.data.max_history_length:
        raise ValueError(
            f"--mean_history {args.mean_history:g}: the model sees 1 to {run.data.max_history_length} tokens; raise "
            "MAX_HISTORY_LENGTH or lower it"
        )
    shape = with_assumptions(shape, mean_history=args.mean_history, candidates=args.candidates, table_rows=table_rows)
    shape = dataclasses.replace(shape, notes=(*shape.notes, *filter(None, [chosen])))
    cluster = Cluster(args.world_size, args.local_world_size, "cuda", round(args.hbm_gib * _GIB))
    return Scenario(run, with_table_rows(measured, table_rows), shape, cluster)


def _sizes(entries: list[str]) -> dict[str, int]:
    """Parses ["item=100000000"] into {"item": 100000000}."""
    sizes = {}
    for entry in entries:
        name, _, rows = entry.partition("=")
        if not rows.replace("_", "").isdigit():
            raise ValueError(f"--table_rows {entry!r}: expected TABLE=ROWS, such as item=100000000")
        if name in sizes:
            raise ValueError(f"--table_rows gives {name!r} twice: {sizes[name]} and {rows}")
        sizes[name] = int(rows)
    return sizes


def _warnings(scenario: Scenario, found: Estimate) -> list[str]:
    run, world_size = scenario.run, scenario.cluster.world_size
    lines = []
    if run.data.num_data_shards < world_size:
        lines.append(f"training on {world_size} ranks also needs --gin.DataConfig.num_data_shards={world_size}")
    if found.training.requests < 1:
        lines.append(f"a rank has {found.training.requests:.2f} requests per step: a larger global batch is due")
    given = f"tower {run.model.name!r} in stage {run.stage!r}"
    if found.memory.activations is None:
        lines.append(f"the plan does not know {given}: its activations and FLOPs are not counted")
    elif found.flops is None:
        lines.append(f"there is no formula for {given}: its FLOPs are not counted")
    left = found.usable_bytes - found.memory.held.max()
    if left > 0 and found.memory.peak.max() > found.usable_bytes:
        needed = (found.memory.peak - found.memory.held).max()
        lines.append(
            f"tables and weights fit, and TorchRec's planner looks at tables alone, but activations do not fit: "
            f"{left / _GIB:.2f} GiB of a rank are left, and a step or a validation takes {needed / _GIB:.2f} GiB on top"
        )
    return lines


def _print(scenario: Scenario, found: Estimate, options: list[Suggestion]) -> None:
    console = Console()
    console.width = max(console.width, _MIN_WIDTH)
    cluster, run, step = scenario.cluster, scenario.run, found.training
    machines = math.ceil(cluster.world_size / cluster.local_world_size)
    console.print(
        f"{run.stage} {run.strategy}, {run.model.name} of {run.model.layers} layers x {run.model.width}, on "
        f"{cluster.world_size} ranks of {cluster.memory_bytes / _GIB:g} GiB on {machines} machines",
        soft_wrap=True,
    )
    for line in (*readable(found.layout.shards, run.tables).splitlines(), *filter(None, [found.saved])):
        console.print(line, soft_wrap=True)
    unique = ", ".join(f"{rows:,.0f} rows of {table}" for table, rows in step.unique_rows.items())
    console.print(
        f"a rank's step: {step.requests:,.1f} requests, {step.tokens:,.0f} history tokens, "
        f"{step.candidates:,.0f} candidates, {step.negatives:,} negatives; it looks up {unique}",
        soft_wrap=True,
    )
    console.print(_memory_table(found))
    console.print(_traffic_table(found))
    if found.flops is not None:
        console.print(
            f"FLOPs, forward and backward: {found.flops.step:.4g} per rank and step, {found.flops.token:.4g} "
            "per history token",
            soft_wrap=True,
        )
    for note in scenario.shape.notes:
        console.print(f"assumed: {note}", soft_wrap=True)
    for warning in _warnings(scenario, found):
        console.print(f"note: {warning}", soft_wrap=True)
    _print_verdict(console, found, options)


def _memory_table(found: Estimate) -> rich.table.Table:
    memory, table = found.memory, rich.table.Table("memory of a rank, MiB", "fullest", "emptiest")
    rows: dict[str, typing.Any] = {
        "table weights": memory.tables,
        "state of the tables' optimizer": memory.optimizer,
        "dense: weights, gradients, AdamW, buckets": memory.dense,
        "maps of managed ids": memory.maps,
        "held all the time": memory.held,
        "activations kept for the backward": memory.activations,
        "gradients under way": memory.working,
        "loss and heads": memory.loss,
        "looked-up rows and their gradients": memory.buffers,
        "training step on top": memory.step,
        "or validation on top": memory.validation,
        "peak": memory.peak,
    }
    for name, value in rows.items():
        values = ["not counted"] * 2
        if value is not None:
            values = [f"{extreme / _MIB:,.1f}" for extreme in (np.max(value), np.min(value))]
        table.add_row(name, *values)
    return table


def _traffic_table(found: Estimate) -> rich.table.Table:
    table = rich.table.Table("sent per step, MiB", "busiest rank", "mean", "to the same machine", "to other machines")
    kinds = {
        "indices to the owners": found.traffic.indices,
        "rows back": found.traffic.rows,
        "gradients of rows": found.traffic.gradients,
        "dense part (ring)": found.traffic.dense,
        "all": found.traffic.total,
    }
    for name, traffic in kinds.items():
        values = [traffic.total.max(), traffic.total.mean(), traffic.intra.mean(), traffic.inter.mean()]
        table.add_row(name, *(f"{value / _MIB:,.3f}" for value in values))
    return table


def _print_verdict(console: Console, found: Estimate, options: list[Suggestion]) -> None:
    peak, usable = found.memory.peak.max() / _GIB, found.usable_bytes / _GIB
    limit = f"{usable:.2f} GiB usable ({RESERVE:.0%} kept free for CUDA context, NCCL and fragmentation)"
    if found.fits:
        console.print(f"fits: peak {peak:.2f} GiB of {limit}", soft_wrap=True)
        return
    console.print(f"does not fit: peak {peak:.2f} GiB, {limit}", soft_wrap=True)
    if found.layout.refusal:
        reason = found.layout.refusal.splitlines()[0]
        console.print(f"TorchRec's planner refuses the tables: {reason}", soft_wrap=True)
    if not any(option.fits for option in options):
        console.print("no single option is enough", soft_wrap=True)
    if options:
        console.print("one option at a time would make the peak", soft_wrap=True)
    for option in options:
        verdict = f"{'fits' if option.fits else 'no':<4} {option.peak_bytes / _GIB:>10.2f} GiB"
        console.print(f"  {verdict}  {option.name}  {option.flags}", soft_wrap=True)


def as_dict(scenario: Scenario, found: Estimate, options: list[Suggestion]) -> dict[str, typing.Any]:
    """Collects everything that is printed, in bytes, with an array of values by rank where they differ."""
    traffic = dataclasses.asdict(found.traffic) | {"total": dataclasses.asdict(found.traffic.total)}
    return {
        "fits": found.fits,
        "usable_bytes": found.usable_bytes,
        "refusal": found.layout.refusal,
        "layout": [*readable(found.layout.shards, scenario.run.tables).splitlines(), *filter(None, [found.saved])],
        "cluster": dataclasses.asdict(scenario.cluster),
        "assumed": [*scenario.shape.notes, *_warnings(scenario, found)],
        "step_of_a_rank": dataclasses.asdict(found.training),
        "memory_bytes": dataclasses.asdict(found.memory) | {"held": found.memory.held, "peak": found.memory.peak},
        "sent_bytes": {kind: {"same_machine": s["intra"], "other_machines": s["inter"]} for kind, s in traffic.items()},
        "flops": None if found.flops is None else dataclasses.asdict(found.flops),
        "options": [dataclasses.asdict(option) for option in options],
    }
