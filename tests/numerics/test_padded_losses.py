"""Tower, head and losses on padded batches, as `cuda_graphs` captures them, against plain ones: sums and gradients.

In float64 only the order of sums differs: 1e-12 of the largest value. What is compiled is float32.
"""

import dataclasses

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext

from gpsd_dist.config import FinetuneConfig, ModelConfig, PretrainConfig, RunConfig, TablesConfig, TrainConfig
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.model import transformer
from gpsd_dist.model.ops.attention import two_part
from gpsd_dist.model.replaceable import call
from gpsd_dist.stages.registry import find
from gpsd_dist.tables.collections import lookup_tables
from tests.helpers.reference import fill_
from tests.helpers.synthetic import make_manifest, make_rows

TABLES = TablesConfig(embedding_dim=16)
PRETRAIN = PretrainConfig(auxiliary=("category",), num_negative_groups=3, num_negatives=8)
# Case -> (stage, width, options, columns of sampling)
CASES: dict[str, tuple[str, int, dict, tuple[str, ...]]] = {
    "pretrain": ("pretrain", 16, {}, ()),
    "pretrain, projected": ("pretrain", 32, {"pretrain": dataclasses.replace(PRETRAIN, temperature=0.02)}, ()),
    "finetune": ("finetune", 16, {}, ()),
    "finetune, ESMM": ("finetune", 16, {"finetune": FinetuneConfig(esmm=True)}, ("weight", "negative_rate")),
    "finetune, one task": ("finetune", 16, {"finetune": FinetuneConfig(task_weights={"buy": 0.0})}, ("weight",)),
}


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch):
    """Attention in half precision there has few shapes."""
    monkeypatch.setattr(transformer, "attend", two_part)


@pytest.fixture
def in_float64(monkeypatch):
    """What lifts half precision must not round."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def made(case, dtype=torch.float64):
    """The stage and its model, and the tables that are looked up."""
    name, width, fields, sampling = CASES[case]
    manifest = dataclasses.replace(make_manifest(), sampling=sampling)
    options = {"pretrain": PRETRAIN, "model": ModelConfig(layers=2, width=width, heads=2), "tables": TABLES} | fields
    execution = ExecutionConfig(token_multiple=512, cuda_graphs=True)
    run = RunConfig(name, "data", "out", train=TrainConfig(bf16=True), execution=execution, **options)
    sharded = lookup_tables(manifest, TABLES, with_candidates=name == "finetune")
    stage = find(name)(run, manifest)
    return stage, fill_(stage.model(sharded).to(dtype)), tuple(table.name for table in sharded)


def batch_of(stage, names, seed, num_rows, dtype=torch.float64):
    """A batch of `num_rows` requests, padded, and random embeddings for it."""
    name = "train" if stage.with_candidates else "pretrain"
    manifest, groups = make_manifest(), {} if stage.with_candidates else {"negatives_per": "group"}
    sizes = {"num_negative_groups": 3, "num_negatives": 8, "token_multiple": 512}
    collate = Collate(manifest, names, 20, stage.with_candidates, **groups, **sizes)
    (batch,) = collate(make_rows(manifest, name, seed=seed, num_rows=num_rows), BatchKey(0, 0, 0))
    random = torch.Generator().manual_seed(seed)
    shares = torch.rand(2, batch.packing.num_candidates, generator=random) + 0.01
    batch = dataclasses.replace(batch, sampling=dict(zip(stage.manifest.sampling, shares)))
    rows = [torch.randn(n, 16, dtype=dtype, generator=random) for n in batch.lookup.length_per_key()]
    return batch, {table: row.requires_grad_() for table, row in zip(batch.lookup.keys(), rows, strict=True)}


def sums_and_gradients(stage, model, batch, embeddings):
    leaves = dict(model.named_parameters()) | embeddings
    sums_L = stage.loss_sums(model, embeddings, batch)
    upstream = torch.arange(1.0, len(sums_L) + 1, dtype=sums_L.dtype)
    gradients = torch.autograd.grad((sums_L * upstream).sum(), list(leaves.values()), materialize_grads=True)
    return {"sums": sums_L.detach()} | dict(zip(leaves, gradients, strict=True))


def worst(found, wanted):
    """The largest difference of any tensor, over its largest value."""
    assert found.keys() == wanted.keys()
    pairs = [(found[name], value) for name, value in wanted.items() if value.numel()]
    return max(float((ours - value).abs().max() / value.abs().max().clamp(min=1e-9)) for ours, value in pairs)


@pytest.mark.parametrize("case", CASES)
def test_padded_batches_have_the_sums_and_gradients_of_plain_ones(case, in_float64):
    stage, model, names = made(case)
    batch, embeddings = batch_of(stage, names, 0, 20)
    wanted = sums_and_gradients(stage, model, dataclasses.replace(batch, padded=None), embeddings)
    assert all(gradient.any() for gradient in wanted.values()), "something is not tested"
    assert worst(sums_and_gradients(stage, model, batch, embeddings), wanted) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_batches_of_two_sizes_are_one_graph(case):
    stage, model, names = made(case, torch.float32)
    graphs, num_weights = {"forward": 0, "backward": 0}, len(list(model.backbone.tower.parameters()))

    def counts(part):
        def compiler(graph, inputs):
            graphs[part] += 1
            # A replay reads weights in place; what is no weight it copies to where the graph reads.
            static = TracingContext.get().fw_metadata.static_input_indices
            assert num_weights < len(static) < len(list(model.parameters()))
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=counts("forward"), bw_compiler=counts("backward"))
    model.backbone.call_padded = torch.compile(call, dynamic=False, fullgraph=True, backend=backend)
    try:
        for seed, num_rows in ((0, 20), (1, 27)):
            batch, embeddings = batch_of(stage, names, seed, num_rows, torch.float32)
            found = sums_and_gradients(stage, model, batch, embeddings)
            plain = dataclasses.replace(batch, padded=None)
            assert worst(found, sums_and_gradients(stage, model, plain, embeddings)) < 1e-5
        assert graphs == {"forward": 1, "backward": 1}
    finally:
        torch._dynamo.reset()


def test_padding_that_counts_as_targets_is_found(in_float64):
    stage, model, names = made("pretrain")
    batch, embeddings = batch_of(stage, names, 0, 20)
    wanted = sums_and_gradients(stage, model, dataclasses.replace(batch, padded=None), embeddings)
    targets = dataclasses.replace(batch.padded.targets, is_real_M=torch.ones_like(batch.padded.targets.is_real_M))
    planted = dataclasses.replace(batch, padded=dataclasses.replace(batch.padded, targets=targets))
    assert worst(sums_and_gradients(stage, model, planted, embeddings), wanted) > 0.1


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("case", ["pretrain", "finetune"])
def test_hardly_any_request_is_no_special_case(case, num_rows, in_float64):
    """A rank may run out of rows, and a history of one event has no target."""
    stage, model, names = made(case)
    batch, embeddings = batch_of(stage, names, 0, num_rows)
    wanted = sums_and_gradients(stage, model, dataclasses.replace(batch, padded=None), embeddings)
    assert worst(sums_and_gradients(stage, model, batch, embeddings), wanted) < 1e-12
