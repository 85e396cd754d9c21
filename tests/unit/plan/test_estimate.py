"""Layout, FLOPs, verdict and what would help, on clusters that do not exist."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpsd_dist.assembly import looked_up_tables, meta_model
from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import DataConfig, ModelConfig, OptimizerConfig
from gpsd_dist.model.transformer import Transformer
from gpsd_dist.plan.estimate import RESERVE, Scenario, estimate, model_size, training_flops
from gpsd_dist.plan.suggestions import suggestions
from gpsd_dist.plan.workload import DataShape, Workload
from gpsd_dist.schema import Split
from gpsd_dist.stages import registry
from gpsd_dist.stages.finetune import Finetune
from gpsd_dist.tables.sharding import Cluster
from tests.helpers.synthetic import make_manifest
from tests.integration.tiny_data import tiny_run

SHAPE = DataShape(10.0, 5.5, 3.0, {"tags": 2.0, "interests": 1.0}, {}, ())
MIB = 2**20


def _scenario(run, *, ranks=8, memory_mib=1024.0, item_rows=1_000_002) -> Scenario:
    valid = Split("valid", (), num_rows=9, num_history_tokens=9, num_candidates=9, time_from_s=0, time_to_s=0)
    manifest = make_manifest(table_rows={"item": item_rows, "tag": 1000})
    manifest = dataclasses.replace(manifest, splits=(valid,))
    cluster = Cluster(ranks, min(ranks, 4), "cuda", round(memory_mib * MIB))
    return Scenario(run, manifest, SHAPE, cluster)


def _run(stage="finetune", **changes):
    changes = {"data": DataConfig(global_batch_rows=64, eval_batch_rows_per_rank=8)} | changes
    return tiny_run(stage, "x", "y", **changes)


def test_tables_and_their_state_by_hand():
    """1,000,002 rows of 16 columns over 8 ranks: 125,001 each but for the last; tags 125 each."""
    memory = estimate(_scenario(_run())).memory
    rows = np.array([125_001 + 125] * 7 + [1_000_002 - 7 * 125_001 + 125])
    assert memory.tables.tolist() == (rows * 16 * 4).tolist()
    assert memory.optimizer.tolist() == (rows * 4).tolist()


def test_frozen_tables_have_no_state_and_send_no_gradients():
    run = dataclasses.replace(_run(), strategy="ST_SF", init_checkpoint="somewhere")
    found, trained = estimate(_scenario(run)), estimate(_scenario(_run()))
    assert found.memory.optimizer.tolist() == [125 * 4] * 8  # tags
    assert found.memory.tables.tolist() == trained.memory.tables.tolist()
    assert found.traffic.gradients.total.sum() < trained.traffic.gradients.total.sum()
    assert found.traffic.rows.total.sum() == trained.traffic.rows.total.sum()
    assert {shard.table for shard in found.layout.shards if shard.is_frozen} == {"item"}


def test_planner_and_memory_decide():
    roomy = estimate(_scenario(_run()))
    assert roomy.fits and not roomy.layout.refusal and roomy.usable_bytes == (1 - RESERVE) * 1024 * MIB
    tight = estimate(_scenario(_run(), memory_mib=9.5))  # the tables take 8.1 of 8.075 MiB
    assert not tight.fits and "Unable to find a plan" in tight.layout.refusal
    assert tight.memory.tables.tolist() == roomy.memory.tables.tolist()  # laid out without the limit
    peak = roomy.memory.peak.max()
    just = estimate(_scenario(_run(), memory_mib=peak / MIB / (1 - RESERVE) * 1.001))
    below = estimate(_scenario(_run(), memory_mib=peak / MIB / (1 - RESERVE) * 0.999))
    assert just.fits and not below.fits and not below.layout.refusal


def test_table_wise_fills_one_rank():
    run = _run(tables={"sharding": {"item": "table_wise"}})
    memory = estimate(_scenario(run)).memory
    assert sorted(memory.tables)[-1] >= 1_000_002 * 64 and sorted(memory.tables)[-2] <= 1000 * 64


@pytest.mark.parametrize("name", ["sasrec", "hstu", "deepfm", "din", "dien", "dmin", "wukong"])
def test_activations_of_every_tower_are_counted(name):
    """Other towers are measured on fake tensors; FLOPs have formulas where attention runs over histories."""
    found = estimate(_scenario(_run(model={"name": name, "max_positions": 60})))
    assert found.memory.activations > found.memory.working > 0
    assert (found.flops is not None) == (name in ("sasrec", "hstu"))


def test_a_refit_validates_nothing():
    found = estimate(_scenario(dataclasses.replace(_run(), refit_of="a run")))
    assert not found.memory.validation.any() and estimate(_scenario(_run())).memory.validation.all()


def test_parameters_are_those_of_the_model():
    run = _run("pretrain")
    manifest = make_manifest(table_rows={"item": 1000, "tag": 1000})
    size = model_size(run, manifest)
    model = meta_model(run, manifest, looked_up_tables(run, manifest))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    block = 16 * 48 + 16 * 16 + 16 * 2 * 64 + 64 * 16
    assert size.matrix_parameters == block and size.auxiliary_rows == 12 and size.head_parameters == 0
    assert size.item_rows == 1000
    ranking = model_size(_run(), manifest)
    in_width = 16 + 4 + 4 + 1 + 1 + 16  # state, tab, segment, discount, age, interests (bag of the sharded table `tag`)
    assert ranking.auxiliary_rows == 0 and ranking.head_values == in_width + 2 * 64
    assert ranking.head_parameters == 2 * (in_width * 64 + 64 + 64 + 1)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_flops_are_those_that_torch_counts(stage):
    """torch counts the matrix products of a real forward and backward; attention, which it misses here, is added."""
    layers, width, history, requests, shown = 3, 64, 12, 8, 2
    candidates = 0 if stage == "pretrain" else requests * shown
    tower = Transformer(ModelConfig(layers=layers, width=width, heads=4), 1)
    packing = Packing.from_lengths(np.full(requests, history), np.full(requests, shown if candidates else 0))
    x = torch.randn(requests * history + candidates, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        tower(x, packing, candidates > 0).sum().backward()
    counted = sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm")
    )
    run = _run(stage, model=ModelConfig(layers=layers, width=width, heads=4), pretrain={"num_negatives": 1})
    tokens, context = requests * history, (history + 1) / 2
    step = Workload(requests, tokens, candidates, context, 0, {})
    if stage == "pretrain":  # the tower's tokens are those that remain without the last of each history
        step = Workload(requests, tokens + requests, candidates, context + 0.5, 0, {})
        assert step.without_last() == Workload(requests, tokens, candidates, context, 0, {})
    size = dataclasses.replace(model_size(run, make_manifest()), head_parameters=0, auxiliary_rows=0)
    if stage == "pretrain":
        attention = layers * 12 * width * context * tokens
        extra = 6 * run.tables.embedding_dim * step.positions  # the one negative
    else:
        attention = 12 * width * ((layers - 1) * context * tokens + layers * (history + 1) * candidates)
        extra = 0
    found = training_flops(run, size, step)
    assert found.step - attention - extra == pytest.approx(counted, rel=1e-9)
    assert found.token == found.step / step.tokens


def test_options_that_would_help_are_recomputed():
    """A table of 61 MiB in 8 ranks of 9.5 MiB: does not fit by itself."""
    scenario = _scenario(_run(sparse=OptimizerConfig("adam", 0.1)), memory_mib=20.0)
    found = estimate(scenario)
    options = {option.name: option for option in suggestions(scenario, found)}
    assert not found.fits
    frozen = options["freeze the transferred tables"]
    assert frozen.flags == "--gin.STRATEGY=ST_SF --gin.INIT_CHECKPOINT=PRETRAINED_RUN"
    run = dataclasses.replace(scenario.run, strategy="ST_SF", init_checkpoint="x")
    again = estimate(dataclasses.replace(scenario, run=run))
    assert frozen.peak_bytes == again.memory.peak.max() and frozen.fits == again.fits
    adagrad = options["row-wise Adagrad for the tables"]
    saved = found.memory.optimizer.max() - 1_000_002 / 8 * 4
    assert adagrad.peak_bytes == pytest.approx(found.memory.peak.max() - saved, rel=1e-3) and adagrad.fits
    ranks = options["16 ranks"]
    assert ranks.fits and ranks.flags == "--world_size 16"
    fp16 = options["freeze the transferred tables, kept in fp16"]
    assert fp16.flags == f"{frozen.flags} --gin.TablesConfig.frozen_dtype=fp16" and fp16.peak_bytes < frozen.peak_bytes
    assert all(option.peak_bytes < found.memory.peak.max() for option in options.values())


def test_frozen_tables_may_take_fewer_bytes():
    """64 columns: 256 bytes a row, 128 in half precision (docs/performance.md)."""
    frozen = {"strategy": "ST_SF", "init_checkpoint": "x"}
    scenario = _scenario(dataclasses.replace(_run(tables={"embedding_dim": 64}), **frozen), memory_mib=20.0)
    found = estimate(scenario)
    options = {option.name: option for option in suggestions(scenario, found)}
    for dtype, row_bytes in (("fp16", 128),):
        option, tables = options[f"frozen tables kept in {dtype}"], found.memory.tables.max()
        assert option.flags == f"--gin.TablesConfig.frozen_dtype={dtype}"
        saved = tables * (1 - row_bytes / 256)
        assert option.peak_bytes == pytest.approx(found.memory.peak.max() - saved, abs=0.01 * tables)


def test_batches_and_precision_help_where_activations_are_the_problem():
    run = _run(data=DataConfig(global_batch_rows=65_536, eval_batch_rows_per_rank=8), model={"layers": 8})
    scenario = _scenario(run, memory_mib=400.0)
    found = estimate(scenario)
    options = {option.name: option for option in suggestions(scenario, found)}
    assert not found.fits and not found.layout.refusal
    parts, smaller = options["gradient accumulation"], options["smaller batches"]
    assert parts.fits and parts.flags.startswith("--gin.TrainConfig.micro_batches=")
    assert smaller.fits and smaller.flags.startswith("--gin.GLOBAL_BATCH_ROWS=")
    rows = int(smaller.flags.split("=")[1])
    doubled = dataclasses.replace(run, data=dataclasses.replace(run.data, global_batch_rows=2 * rows))
    assert not estimate(dataclasses.replace(scenario, run=doubled)).fits  # the largest that fits
    assert options["bf16 autocast of the dense part"].peak_bytes < found.memory.peak.max()
    for name, flags in (
        ("activation checkpointing of every layer", {"activation_checkpointing": True}),
        ("FSDP2 of the dense part", {"dense_parallel": "fsdp2"}),
    ):
        [(key, value)] = flags.items()
        again = dataclasses.replace(run, execution=dataclasses.replace(run.execution, **flags))
        peak = estimate(dataclasses.replace(scenario, run=again)).memory.peak.max()
        assert options[name].flags == f"--gin.ExecutionConfig.{key}={value}"
        assert options[name].peak_bytes == peak < found.memory.peak.max()


def test_whole_tables_can_be_cut():
    run = _run(tables={"sharding": {"item": "table_wise"}, "embedding_dim": 256}, model={"width": 16})
    scenario = _scenario(run, memory_mib=800.0)
    found = estimate(scenario)
    options = {option.name: option for option in suggestions(scenario, found)}
    assert "Unable to find a plan" in found.layout.refusal
    row, column = options["row_wise tables ['item']"], options["column_wise tables ['item']"]
    assert row.fits and row.peak_bytes < column.peak_bytes < found.memory.peak.max()
    assert row.flags == "\"--gin.TablesConfig.sharding={'item': 'row_wise'}\""


def test_a_managed_table_that_is_trained_is_not_cut_by_columns():
    """Training would refuse that; frozen, its rows stay where they are and it may be cut."""
    run = _run(tables={"sharding": {"item": "table_wise"}, "embedding_dim": 256}, model={"width": 16})
    frozen = dataclasses.replace(run, strategy="ST_SF", init_checkpoint="somewhere")
    for changed, offered in ((run, {"row_wise"}), (frozen, {"row_wise", "column_wise"})):
        scenario = _scenario(changed, memory_mib=800.0)
        manifest = dataclasses.replace(scenario.manifest, unbounded={"item": "managed"})
        scenario = dataclasses.replace(scenario, manifest=manifest)
        names = {option.name for option in suggestions(scenario, estimate(scenario))}
        assert {kind for kind in ("row_wise", "column_wise") if f"{kind} tables ['item']" in names} == offered


def test_a_stage_without_formulas_is_planned_without_activations_and_flops(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.STAGES, "third", lambda: Finetune)
    found = estimate(_scenario(tiny_run("third", "data", tmp_path)))
    assert found.flops is None and found.memory.activations is None and found.memory.dense > 0
