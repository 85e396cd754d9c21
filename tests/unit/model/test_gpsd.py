import dataclasses

import pytest
import torch

from gpsd_dist.config import ModelConfig, PretrainConfig, RunConfig, TablesConfig
from gpsd_dist.config.model import models_with
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.model.gpsd import NextItemModel, RankingModel
from gpsd_dist.model.registry import TOWERS
from gpsd_dist.stages.pretrain import Pretrain
from gpsd_dist.tables.collections import Tables, lookup_tables
from tests.helpers.reference import fill_, rms_norm
from tests.helpers.synthetic import make_manifest, make_rows

MANIFEST = make_manifest()
CONFIG = TablesConfig(embedding_dim=8, small_table_max_rows=20)
MODEL = ModelConfig(layers=1, width=16, heads=2)
GENERATIVE = models_with("is_generative")


def make_batch(split, sharded, num_rows=9):
    lookup = tuple(table.name for table in sharded)
    rows = make_rows(MANIFEST, split, seed=3, num_rows=num_rows)
    with_candidates = split != "pretrain"
    options = {} if with_candidates else {"negatives_per": "group", "num_negative_groups": 2, "num_negatives": 4}
    [batch] = Collate(MANIFEST, lookup, 10, with_candidates, **options)(rows, BatchKey(0, 0, 0))
    return batch


def pretraining(config=CONFIG, model=MODEL, auxiliary=("category",), num_rows=9):
    sharded = lookup_tables(MANIFEST, config, with_candidates=False)
    tables = fill_(Tables(sharded, (), config, torch.device("cpu")))
    batch = make_batch("pretrain", sharded, num_rows)
    return fill_(NextItemModel(MANIFEST, config, model, sharded, auxiliary)), tables(batch.lookup), batch


def ranking(model=MODEL, tasks=("click", "buy"), num_rows=9):
    sharded = lookup_tables(MANIFEST, CONFIG, with_candidates=True)
    tables = fill_(Tables(sharded, (), CONFIG, torch.device("cpu")))
    batch = make_batch("train", sharded, num_rows)
    return fill_(RankingModel(MANIFEST, CONFIG, model, sharded, tasks)), tables(batch.lookup), batch


def test_an_offset_is_the_number_of_the_log_and_not_the_standardised_one():
    """A model that has learnt nothing (a last layer of zeros) gives the other model's log-odds back."""
    features = [dataclasses.replace(f, mean=-1.5, std=0.5) if f.name == "discount" else f for f in MANIFEST.features]
    manifest = dataclasses.replace(MANIFEST, features=tuple(features))
    _, rows, batch = ranking()
    sharded = lookup_tables(manifest, CONFIG, with_candidates=True)
    model = fill_(RankingModel(manifest, CONFIG, MODEL, sharded, ("click", "buy"), "discount"))
    with torch.no_grad():
        for mlp in model.heads.mlps.values():
            mlp[-1].weight.zero_(), mlp[-1].bias.zero_()
        logits = model(rows, batch)
    assert len(batch.candidate["discount"].unique()) > 3
    torch.testing.assert_close(logits["click"], batch.candidate["discount"] * 0.5 - 1.5)
    assert not logits["buy"].any()


@pytest.mark.parametrize("name", ["item", "age"])
def test_an_offset_of_another_kind_is_refused(name):
    sharded = lookup_tables(MANIFEST, CONFIG, with_candidates=True)
    with pytest.raises(ValueError, match=f"offset '{name}' is no numerical feature of candidates"):
        RankingModel(MANIFEST, CONFIG, MODEL, sharded, ("click",), name)


@pytest.mark.parametrize(("revision", "eps"), [(1, 1e-5), (2, 1e-6), (3, 1e-6)])
def test_projections_where_the_widths_differ(revision, eps):
    """RMSNorm + linear in, linear + RMSNorm out (official settings)."""
    model, rows, batch = pretraining(model=dataclasses.replace(MODEL, revision=revision))
    with torch.no_grad():
        rows["item"] *= 1e-3  # as small as at first, so that eps counts
        for parameter in model.backbone.embedder.parameters():
            parameter *= 1e-3
    w = dict(model.named_parameters())
    tokens = model.backbone.embedder(rows, batch)
    x = rms_norm(tokens, w["backbone.project_in.layers.0.weight"], eps) @ w["backbone.project_in.layers.1.weight"].T
    hidden = model.backbone.tower(x, batch.packing)
    out = rms_norm(hidden @ w["project_out.layers.0.weight"].T, w["project_out.layers.1.weight"], eps)
    torch.testing.assert_close(model(rows, batch).hidden_TE, out, rtol=1e-4, atol=1e-5)


def test_no_projections_where_the_widths_agree():
    model, rows, batch = pretraining(model=dataclasses.replace(MODEL, width=8))
    assert not [name for name, _ in model.named_parameters() if "project" in name]
    hidden = model.backbone.tower(model.backbone.embedder(rows, batch), batch.packing)
    torch.testing.assert_close(model(rows, batch).hidden_TE, hidden)


def test_auxiliary_weight_is_the_input_table():
    model, rows, batch = pretraining()
    weight = model(rows, batch).auxiliary_weight["category"]
    table = model.backbone.embedder.small["category"].weight
    assert weight._base is table and weight.data_ptr() == table.data_ptr()


@pytest.mark.parametrize(
    ("auxiliary", "options"),
    [
        (("tags",), {"small_table_max_rows": 100}),  # a bag
        (("category",), {"small_table_max_rows": 5}),  # a sharded table
        (("item",), {}),
        (("segment",), {}),  # context is no token feature
        (("price",), {}),  # numerical
        (("colour",), {}),  # unknown
    ],
    ids=str,
)
def test_wrong_auxiliary_targets_are_errors(auxiliary, options):
    with pytest.raises(ValueError, match=auxiliary[0]):
        pretraining(dataclasses.replace(CONFIG, **options), auxiliary=auxiliary)


def test_logits_are_the_head_on_candidate_state_and_context():
    model, rows, batch = ranking()
    x = torch.cat((model.backbone(rows, batch)[batch.packing.num_history_tokens :], model.context(rows, batch)), -1)
    logits = model(rows, batch)
    assert list(logits) == ["click", "buy"]
    for task, logit in logits.items():
        first, second = model.heads.mlps[task][0], model.heads.mlps[task][2]
        expected = (x @ first.weight.T + first.bias).clamp(min=0) @ second.weight[0] + second.bias
        torch.testing.assert_close(logit, expected, rtol=1e-4, atol=1e-4)
        assert first.weight.shape[0] == 4 * MODEL.width
    assert not torch.equal(logits["click"], logits["buy"])


def of_name(name):
    return dataclasses.replace(MODEL, name=name, max_positions=11)


@pytest.mark.parametrize("num_rows", [9, 0])
@pytest.mark.parametrize(
    ("name", "tasks"),
    [("transformer", ("click",)), ("transformer", ("buy",)), *((name, ("click", "buy")) for name in TOWERS)],
    ids=str,
)
def test_every_parameter_of_ranking_gets_a_gradient(name, tasks, num_rows):
    """DistributedDataParallel waits for each: one without would hang or fail a multi-rank run. Empty batches too."""
    model, rows, batch = ranking(of_name(name), tasks=tasks, num_rows=num_rows)
    sum(logit.sum() for logit in model(rows, batch).values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("num_rows", [9, 0])
@pytest.mark.parametrize("name", GENERATIVE)
def test_every_parameter_of_pretraining_gets_a_gradient(name, num_rows):
    model, rows, batch = pretraining(model=dataclasses.replace(MODEL, name=name), num_rows=num_rows)
    run = RunConfig("pretrain", "data", "out", pretrain=PretrainConfig(auxiliary=("category",)))
    Pretrain(run, MANIFEST).loss_sums(model, rows, batch).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", GENERATIVE)
def test_backbone_of_pretraining_fits_the_one_of_ranking(name):
    """What full transfer copies: names and shapes agree, candidates bring no token feature of their own."""
    model = dataclasses.replace(MODEL, name=name)
    pretrained, ranker = pretraining(model=model)[0], ranking(model)[0]
    ours, theirs = pretrained.backbone.state_dict(), ranker.backbone.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize("name", TOWERS)
def test_dropout_is_off_in_evaluation(name):
    model, rows, batch = ranking(dataclasses.replace(of_name(name), dropout=0.5))
    assert not torch.equal(model(rows, batch)["click"], model(rows, batch)["click"])
    model.eval()
    assert torch.equal(model(rows, batch)["click"], model(rows, batch)["click"])


@pytest.mark.parametrize("name", TOWERS)
def test_ranking_runs_in_bf16(name):
    model, rows, batch = ranking(of_name(name))
    exact = model(rows, batch)["click"].detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(rows, batch)["click"]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))
    rounded.sum().backward()


def test_unknown_model_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'transfomer' is not one of .*'transformer'"):
        ranking(dataclasses.replace(MODEL, name="transfomer"))
