"""Suggests what would make a run fit: options that exist, with their flags, and techniques that are not built yet."""

import dataclasses
import typing

import numpy as np

from gpsd_dist.config.model import MODELS
from gpsd_dist.config.tables import FROZEN_DTYPES
from gpsd_dist.plan.estimate import Estimate, Layout, Scenario, estimate
from gpsd_dist.plan.memory import Memory
from gpsd_dist.preflight import tables_kept_whole

_MAX_RANKS = 1024
_MIN_COLUMNS = 256  # TorchRec cuts columns into pieces of 128 at least
_CACHED_PART = 0.2  # of a table's rows in HBM with UVM caching; TorchRec's default


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Holds the peak memory after one change, everything else unchanged."""

    name: str
    flags: str  # to add to the command line; empty if it is not built yet
    peak_bytes: float  # of the fullest rank
    fits: bool
    is_built: bool


def suggestions(scenario: Scenario, found: Estimate) -> list[Suggestion]:
    """Lists every change that lowers the peak of the fullest rank, existing options first."""
    built = [*_freezing(scenario), *_layouts(scenario), *_ranks(scenario), *_batches(scenario, found)]
    built += _executions(scenario, found)
    useful = [option for option in (*built, *_not_built(scenario, found)) if option.peak_bytes < _peak(found.memory)]
    return sorted(useful, key=lambda option: (not option.is_built, not option.fits))


def _freezing(scenario: Scenario) -> typing.Iterator[Suggestion]:
    run = scenario.run
    if run.stage == "finetune" and not run.freezes_tables:
        strategy = {"NT": "ST_SF", "ST": "ST_SF", "FT": "FT_SF"}[run.strategy]
        source = run.init_checkpoint or "PRETRAINED_RUN"
        flags = f"--gin.STRATEGY={strategy}" + ("" if run.init_checkpoint else f" --gin.INIT_CHECKPOINT={source}")
        frozen = dataclasses.replace(run, strategy=strategy, init_checkpoint=source)
        scenario = dataclasses.replace(scenario, run=frozen)
        yield _built("freeze the transferred tables", flags, scenario)
        yield from _fewer_bytes(scenario, "freeze the transferred tables, kept in", f"{flags} ")
    elif run.freezes_tables:
        yield from _fewer_bytes(scenario, "frozen tables kept in", "")


def _fewer_bytes(scenario: Scenario, name: str, flags: str) -> typing.Iterator[Suggestion]:
    """Tries smaller types of frozen tables."""
    tables = scenario.run.tables
    for dtype in FROZEN_DTYPES[FROZEN_DTYPES.index(tables.frozen_dtype) + 1 :]:
        changed = _replaced(scenario, "tables", frozen_dtype=dtype)
        yield _built(f"{name} {dtype}", f"{flags}--gin.TablesConfig.frozen_dtype={dtype}", changed)


def _layouts(scenario: Scenario) -> typing.Iterator[Suggestion]:
    """Tries a smaller optimizer state and other ways to shard the tables."""
    run = scenario.run
    if run.sparse.name not in ("rowwise_adagrad", "sgd"):
        changed = _replaced(scenario, "sparse", name="rowwise_adagrad")
        yield _built("row-wise Adagrad for the tables", "--gin.sparse/OptimizerConfig.name=rowwise_adagrad", changed)
    whole = [table for table, sharding in run.tables.sharding.items() if sharding != "row_wise"]
    can_cut_columns = run.tables.embedding_dim >= _MIN_COLUMNS
    cuttable = sorted(set(whole) - tables_kept_whole(run, scenario.manifest)) if can_cut_columns else []
    for kind, tables in (("row_wise", sorted(whole)), ("column_wise", cuttable)):
        if not tables:
            continue
        sharding = run.tables.sharding | dict.fromkeys(tables, kind)
        flags = f'"--gin.TablesConfig.sharding={sharding}"'
        yield _built(f"{kind} tables {tables}", flags, _replaced(scenario, "tables", sharding=sharding))


def _ranks(scenario: Scenario) -> typing.Iterator[Suggestion]:
    """Doubles the number of ranks until the run fits; the global batch stays."""
    now = scenario.cluster.world_size
    numbers = _doubles(now, min(_MAX_RANKS, now * 16))
    changes = ((n, dataclasses.replace(scenario.cluster, world_size=n)) for n in numbers)
    options = ((f"{n} ranks", f"--world_size {n}", dataclasses.replace(scenario, cluster=c)) for n, c in changes)
    yield from _first_that_fits(options)


def _batches(scenario: Scenario, found: Estimate) -> typing.Iterator[Suggestion]:
    """Tries smaller batches, more micro-batches and autocast; the layout of the tables stays."""
    run, data = scenario.run, scenario.run.data
    least, most = scenario.cluster.world_size, found.training.requests
    rows, tokens = _halves(data.global_batch_rows, least), _halves(data.global_batch_tokens, least)
    validation = _halves(data.eval_batch_rows_per_rank, 1)
    parts = [] if run.execution.cuda_graphs else _doubles(run.train.micro_batches, most)
    precisions = [True] if not run.train.bf16 else []
    for label, flag, part, field, values in (
        ("smaller batches", "GLOBAL_BATCH_ROWS", "data", "global_batch_rows", rows),
        ("smaller batches", "DataConfig.global_batch_tokens", "data", "global_batch_tokens", tokens),
        ("gradient accumulation", "", "train", "micro_batches", parts),
        ("smaller batches in validation", "", "data", "eval_batch_rows_per_rank", validation),
        ("bf16 autocast of the dense part", "", "train", "bf16", precisions),
    ):
        flag = flag or f"{'TrainConfig' if part == 'train' else 'DataConfig'}.{field}"
        options = ((label, f"--gin.{flag}={v}", _replaced(scenario, part, **{field: v})) for v in values)
        yield from _first_that_fits(options, found.layout)


def _executions(scenario: Scenario, found: Estimate) -> typing.Iterator[Suggestion]:
    """Tries ways to run the same step in less memory; the layout of the tables stays."""
    run = scenario.run
    if run.execution.cuda_graphs:  # training refuses both options with CUDA graphs
        return
    if MODELS[run.model.name].has_blocks and not run.execution.activation_checkpointing:
        changed = _replaced(scenario, "execution", activation_checkpointing=True)
        flags = "--gin.ExecutionConfig.activation_checkpointing=True"
        yield _built("activation checkpointing of every layer", flags, changed, found.layout)
    if scenario.cluster.world_size > 1 and run.execution.dense_parallel == "ddp" and not run.model.compile:
        changed = _replaced(scenario, "execution", dense_parallel="fsdp2")
        yield _built("FSDP2 of the dense part", "--gin.ExecutionConfig.dense_parallel=fsdp2", changed, found.layout)


def _not_built(scenario: Scenario, found: Estimate) -> typing.Iterator[Suggestion]:
    """Estimates techniques that are not built, from the part of the memory that each would change."""
    memory, trained = found.memory, np.zeros_like(found.memory.tables)
    for shard in found.layout.shards:
        trained[shard.rank] += 0 if shard.is_frozen else shard.rows * shard.columns * shard.value_bytes
    if trained.any():
        yield _other("trained tables in bf16", dataclasses.replace(memory, tables=memory.tables - trained / 2), found)
    cached = dataclasses.replace(memory, tables=memory.tables * _CACHED_PART)
    yield _other(f"UVM caching with {_CACHED_PART:.0%} of the rows in HBM, the rest in host memory", cached, found)


def _first_that_fits(
    options: typing.Iterable[tuple[str, str, Scenario]], layout: Layout | None = None
) -> typing.Iterator[Suggestion]:
    """Yields the first of (name, flags, scenario) that fits, or else the last one."""
    suggestion = None
    for name, flags, changed in options:
        suggestion = _built(name, flags, changed, layout)
        if suggestion.fits:
            break
    if suggestion is not None:
        yield suggestion


def _halves(value: int, least: int) -> typing.Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _doubles(value: int, most: float) -> typing.Iterator[int]:
    while value * 2 <= most:
        value *= 2
        yield value


def _replaced(scenario: Scenario, part: str, **fields: typing.Any) -> Scenario:
    new = dataclasses.replace(getattr(scenario.run, part), **fields)
    return dataclasses.replace(scenario, run=dataclasses.replace(scenario.run, **{part: new}))


def _built(name: str, flags: str, changed: Scenario, layout: Layout | None = None) -> Suggestion:
    found = estimate(changed, layout)
    return Suggestion(name, flags, _peak(found.memory), found.fits, is_built=True)


def _other(name: str, changed: Memory, found: Estimate) -> Suggestion:
    return Suggestion(name, "", _peak(changed), _peak(changed) <= found.usable_bytes, is_built=False)


def _peak(memory: Memory) -> float:
    return float(np.max(memory.peak))
