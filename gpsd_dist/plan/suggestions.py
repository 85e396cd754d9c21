"""Suggests what would make a run fit: options, with their flags."""

import dataclasses
import typing

import numpy as np

from gpsd_dist.config.model import MODELS
from gpsd_dist.config.tables import FROZEN_DTYPES
from gpsd_dist.plan.estimate import Estimate, Layout, Scenario, estimate
from gpsd_dist.preflight import tables_kept_whole

_MAX_RANKS = 1024
_MIN_COLUMNS = 256  # TorchRec cuts columns into pieces of 128 at least


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Holds the peak memory after one change, everything else unchanged."""

    name: str
    flags: str  # to add to the command line
    peak_bytes: float  # of the fullest rank
    fits: bool


def suggestions(scenario: Scenario, found: Estimate) -> list[Suggestion]:
    """Lists every change that lowers the peak of the fullest rank; those that fit come first."""
    options = [*_freezing(scenario), *_layouts(scenario), *_ranks(scenario), *_batches(scenario, found)]
    options += _executions(scenario, found)
    useful = [option for option in options if option.peak_bytes < _peak(found)]
    return sorted(useful, key=lambda option: not option.fits)


def _freezing(scenario: Scenario) -> typing.Iterator[Suggestion]:
    run = scenario.run
    if run.stage == "finetune" and not run.freezes_tables:
        strategy = {"NT": "ST_SF", "ST": "ST_SF", "FT": "FT_SF"}[run.strategy]
        source = run.init_checkpoint or "PRETRAINED_RUN"
        flags = f"--gin.STRATEGY={strategy}" + ("" if run.init_checkpoint else f" --gin.INIT_CHECKPOINT={source}")
        frozen = dataclasses.replace(run, strategy=strategy, init_checkpoint=source)
        scenario = dataclasses.replace(scenario, run=frozen)
        yield _option("freeze the transferred tables", flags, scenario)
        yield from _fewer_bytes(scenario, "freeze the transferred tables, kept in", f"{flags} ")
    elif run.frozen_tables and not run.tables.frozen_rows:
        yield from _fewer_bytes(scenario, "frozen tables kept in", "")


def _fewer_bytes(scenario: Scenario, name: str, flags: str) -> typing.Iterator[Suggestion]:
    """Tries smaller types of frozen tables."""
    tables = scenario.run.tables
    for dtype in FROZEN_DTYPES[FROZEN_DTYPES.index(tables.frozen_dtype) + 1 :]:
        changed = _replaced(scenario, "tables", frozen_dtype=dtype)
        yield _option(f"{name} {dtype}", f"{flags}--gin.TablesConfig.frozen_dtype={dtype}", changed)


def _layouts(scenario: Scenario) -> typing.Iterator[Suggestion]:
    """Tries a smaller optimizer state and other ways to shard the tables."""
    run = scenario.run
    if run.sparse.name not in ("rowwise_adagrad", "sgd"):
        changed = _replaced(scenario, "sparse", name="rowwise_adagrad")
        yield _option("row-wise Adagrad for the tables", "--gin.sparse/OptimizerConfig.name=rowwise_adagrad", changed)
    whole = [table for table, sharding in run.tables.sharding.items() if sharding != "row_wise"]
    can_cut_columns = run.tables.embedding_dim >= _MIN_COLUMNS
    cuttable = sorted(set(whole) - tables_kept_whole(run, scenario.manifest)) if can_cut_columns else []
    for kind, tables in (("row_wise", sorted(whole)), ("column_wise", cuttable)):
        if not tables:
            continue
        sharding = run.tables.sharding | dict.fromkeys(tables, kind)
        flags = f'"--gin.TablesConfig.sharding={sharding}"'
        yield _option(f"{kind} tables {tables}", flags, _replaced(scenario, "tables", sharding=sharding))


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
        yield _option("activation checkpointing of every layer", flags, changed, found.layout)
    if scenario.cluster.world_size > 1 and run.execution.dense_parallel == "ddp" and not run.model.compile:
        changed = _replaced(scenario, "execution", dense_parallel="fsdp2")
        yield _option("FSDP2 of the dense part", "--gin.ExecutionConfig.dense_parallel=fsdp2", changed, found.layout)


def _first_that_fits(
    options: typing.Iterable[tuple[str, str, Scenario]], layout: Layout | None = None
) -> typing.Iterator[Suggestion]:
    """Yields the first of (name, flags, scenario) that fits, or else the last one."""
    suggestion = None
    for name, flags, changed in options:
        suggestion = _option(name, flags, changed, layout)
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


def _option(name: str, flags: str, changed: Scenario, layout: Layout | None = None) -> Suggestion:
    found = estimate(changed, layout)
    return Suggestion(name, flags, _peak(found), found.fits)


def _peak(found: Estimate) -> float:
    return float(np.max(found.memory.peak))
