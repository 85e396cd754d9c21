"""Bytes by hand, and activations against what autograd really keeps. Whole steps: tests/integration/test_plan.py."""

import dataclasses

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import CUDA_ONLY_SPARSE_OPTIMIZERS, SPARSE_OPTIMIZERS, ModelConfig, TrainConfig
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.distributed.dense_parallel import recompute_blocks
from gpsd_dist.model.transformer import Transformer, ffn_width
from gpsd_dist.plan import memory as memories
from gpsd_dist.plan.memory import Memory, ModelSize, transformer_bytes
from gpsd_dist.plan.workload import Workload
from gpsd_dist.tables.sharding import Cluster, Shard
from tests.integration.tiny_data import tiny_run

PIECE = Shard("item", False, "row_wise", 0, 10, 8)
SIZE = ModelSize(
    parameters=1000,
    matrix_parameters=600,
    item_table="item",
    item_rows=100,
    auxiliary_rows=7,
    head_parameters=50,
    head_values=16 + 5 + 2 * 64,
)


@pytest.mark.parametrize(
    ("optimizer", "size"),
    [
        ("sgd", 0),
        ("rowwise_adagrad", 10 * 4),
        ("adagrad", 10 * 8 * 4),
        ("adam", 2 * 10 * 8 * 4),
        ("lamb", 2 * 10 * 8 * 4),
        ("partial_rowwise_adam", 10 * 8 * 4 + 10 * 4),
    ],
)
def test_state_of_a_table_by_hand(optimizer, size):
    assert memories.table_state_bytes(optimizer, PIECE) == size
    assert memories.table_state_bytes(optimizer, dataclasses.replace(PIECE, is_frozen=True)) == 0


def test_every_sparse_optimizer_has_a_size():
    assert set(CUDA_ONLY_SPARSE_OPTIMIZERS) < set(SPARSE_OPTIMIZERS)
    for name in SPARSE_OPTIMIZERS:
        assert memories.table_state_bytes(name, PIECE) >= 0


def test_dense_part_by_hand():
    run = tiny_run("finetune", "x", "y")
    assert memories.dense_bytes(run, SIZE, world_size=1) == 1000 * 16
    assert memories.dense_bytes(run, SIZE, world_size=8) == 1000 * 20
    averaged = tiny_run("finetune", "x", "y", train=TrainConfig(average_fraction=0.1))
    assert memories.dense_bytes(averaged, SIZE, world_size=1) == 1000 * 20
    half = tiny_run("finetune", "x", "y", train=TrainConfig(bf16=True))
    assert memories.dense_bytes(half, SIZE, world_size=8) == 1000 * 20 + 600 * 2
    sharded = dataclasses.replace(run, execution=ExecutionConfig(dense_parallel="fsdp2"))
    deep = dataclasses.replace(sharded, model=dataclasses.replace(run.model, layers=4))
    assert memories.dense_bytes(deep, SIZE, world_size=8) == 1000 * 16 / 8 + 4 * (2 * 300 + 2 * 400)
    assert memories.dense_bytes(deep, SIZE, world_size=1) == 1000 * 16
    parts = dataclasses.replace(deep, train=dataclasses.replace(run.train, micro_batches=2))  # gradients stay whole
    assert memories.dense_bytes(parts, SIZE, world_size=8) == 1000 * 16 / 8 + 4 * (300 + 600 + 2 * 400)
    half = dataclasses.replace(deep, train=dataclasses.replace(run.train, bf16=True))
    assert memories.dense_bytes(half, SIZE, world_size=8) == 1000 * 16 / 8 + 2 * (2 * 300) + 4 * (2 * 400)


def test_buffers_by_hand():
    """Two ranks look up 8 rows of 4 columns each, 4 of them here: 16 bytes a row and 16 of indices."""
    cluster = Cluster(2, 2, "cuda")
    pieces = [Shard("item", False, "row_wise", rank, 5, 4) for rank in range(2)]
    step = Workload(1.0, 8.0, 0.0, 4.5, 0, {"item": 8.0})
    forward = 2 * 4 * (16 + 16) + 2 * 8 * (16 + 16)  # found for 2 ranks; arrived and in order
    assert memories.buffer_bytes(tuple(pieces), cluster, step, has_backward=False).tolist() == [forward] * 2
    both = 2 * 4 * (32 + 16) + 2 * 8 * (32 + 16)
    assert memories.buffer_bytes(tuple(pieces), cluster, step, has_backward=True).tolist() == [both] * 2
    frozen = tuple(dataclasses.replace(piece, is_frozen=True) for piece in pieces)
    assert memories.buffer_bytes(frozen, cluster, step, has_backward=True).tolist() == [forward] * 2


def test_losses_by_hand():
    step = Workload(requests=4.0, tokens=40.0, candidates=12.0, context=5.5, negatives=32, unique_rows={"item": 50.0})
    positions = 40 - 4  # E 16, 2 groups of 16 negatives
    states = 4 * positions * 16 + 3 * 50 * 16
    for per, logits in (("group", positions / 2 * 16), ("request", positions / 4 * 16), ("position", 3 * 2**21)):
        run = tiny_run("pretrain", "x", "y", pretrain={"negatives_per": per})
        expected = 4 * (states + logits + 4 * positions * 7) + 32 * 16
        assert memories.loss_bytes(run, SIZE, step) == pytest.approx(expected)
    ranking = tiny_run("finetune", "x", "y")  # D 16
    assert memories.loss_bytes(ranking, SIZE, step) == 4 * 12 * (16 + 5 + 2 * 64)


def test_validation_of_pretraining_holds_a_part_of_the_items():
    """100 rows over 2 ranks, 16 columns: 3,200 bytes, twice while it is put together."""
    run, cluster = tiny_run("pretrain", "x", "y"), Cluster(2, 2, "cuda")
    nothing = Workload(1e-6, 0.0, 0.0, 1.0, 0, {})
    found = memories.validation_bytes(run, (), cluster, nothing, item_rows=100)
    assert found.tolist() == pytest.approx([50 * 16 * 4 + 50 * 16 * 8] * 2, rel=1e-3)  # part and its float64 chunk
    many = memories.validation_bytes(run, (), cluster, Workload(1000.0, 0, 0, 1.0, 0, {}), item_rows=10**9)
    assert many[0] == pytest.approx(2 * 10**9 / 2 * 16 * 4, rel=1e-3)


def test_peak_takes_the_larger_of_step_and_validation():
    parts = {"tables": np.array([4.0, 1.0]), "optimizer": np.array([1.0, 1.0]), "dense": 2, "activations": 10.0}
    step = {"working": 3.0, "loss": 1.0, "buffers": np.array([1.0, 2.0])}
    memory = Memory(**parts, maps=6, **step, validation=np.array([5.0, 40.0]))
    assert memory.held.tolist() == [13, 10] and memory.step.tolist() == [15, 16]
    assert memory.peak.tolist() == [28, 50]


def _kept_bytes(
    layers, width, heads, history, requests, candidates, dropout, bf16, recomputed=False
) -> tuple[int, int]:
    """Storage that autograd keeps for the backward of a real forward on CPU, without parameters; batch in tokens."""
    torch.manual_seed(0)
    tower = Transformer(ModelConfig(layers=layers, width=width, heads=heads, dropout=dropout), 1)
    if recomputed:
        recompute_blocks(tower, has_dropout=dropout > 0)
    packing = Packing.from_lengths(np.full(requests, history), np.full(requests, candidates))
    x = torch.randn(requests * (history + candidates), width, requires_grad=True)
    storages, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # a freed address could come again
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            tower(x, packing, candidates > 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}
    kept = sum(size for address, size in storages.items() if address not in weights)
    copies = 2 * sum(p.numel() for p in tower.parameters() if p.dim() == 2) if bf16 else 0  # counted as dense
    return kept - copies, len(x)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("width", "history", "candidates"), [(64, 16, 0), (128, 16, 4), (64, 50, 1), (128, 16, 20)])
def test_activations_are_what_autograd_keeps(width, history, candidates, dropout, bf16):
    """Within 1 %: reciprocal norms and slots of tokens are not counted."""
    requests, layers = 16, 3
    kept, _ = _kept_bytes(layers, width, 4, history, requests, candidates, dropout, bf16)
    run = tiny_run(
        "finetune" if candidates else "pretrain",
        "x",
        "y",
        model=ModelConfig(layers=layers, width=width, heads=4, dropout=dropout),
        tables={"embedding_dim": width},
        train=TrainConfig(bf16=bf16),
    )
    tokens, shown = float(requests * history), float(requests * candidates)
    found, _ = transformer_bytes(run, Workload(requests, tokens, shown, (history + 1) / 2, 0, {}), "cpu")
    assert found == pytest.approx(kept, rel=0.01)


def test_recomputed_activations_are_the_inputs_of_the_blocks_and_one_block():
    """5 %: random states are not counted. Rotations and masks stay too, but no block saves them: they go into it."""
    kept, tokens = _kept_bytes(6, 64, 4, 16, 16, 0, 0.0, False, recomputed=True)
    run = tiny_run("pretrain", "x", "y", model={"layers": 6, "width": 64, "heads": 4}, tables={"embedding_dim": 64})
    shorter = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=5))
    recomputed = dataclasses.replace(run, execution=ExecutionConfig(activation_checkpointing=True))
    step = Workload(16, float(tokens), 0.0, 8.5, 0, {})
    six, five, found = (transformer_bytes(r, step, "cpu")[0] for r in (run, shorter, recomputed))
    shared = tokens * 12 * 64 + memories._attention_bytes(run, step, "cpu")[1]
    assert found - (six - five) == pytest.approx(kept + shared, rel=0.05)
    assert found < six / 3


def test_parts_of_a_batch_share_the_activations():
    """All but the weights multiplied with their gains, which every part needs whole (CPU without autocast, and more
    tokens in a part than a layer has outputs).
    """
    step = Workload(160.0, 1600.0, 640.0, 5.5, 0, {})
    whole, parts = (
        tiny_run("finetune", "x", "y", train=TrainConfig(micro_batches=m), model={"layers": 3}) for m in (1, 4)
    )
    assert transformer_bytes(parts, step, "cuda")[0] == pytest.approx(transformer_bytes(whole, step, "cuda")[0] / 4)
    width = whole.model.width
    weights = 3 * 4 * width * (3 * width + 2 * ffn_width(width))
    activations = transformer_bytes(whole, step, "cpu")[0] - weights
    assert transformer_bytes(parts, step, "cpu")[0] == pytest.approx(weights + activations / 4)


def test_two_part_kernel_copies_no_keys():
    """CUDA with autocast; without it, the buckets' copies are there on CUDA too."""
    step = Workload(10.0, 100.0, 30.0, 5.5, 0, {})
    half, full = (tiny_run("finetune", "x", "y", train=TrainConfig(bf16=bf16)) for bf16 in (True, False))
    assert memories._candidate_bytes(half, step, "cuda") == 0
    assert memories._candidate_bytes(full, step, "cuda") == memories._candidate_bytes(full, step, "cpu") > 0
