"""Sizes and initial weights of SASRec and HSTU."""

import dataclasses

import pytest
import torch

from gpsd_dist import schema
from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.model.gpsd import Backbone, NextItemModel, RankingModel
from gpsd_dist.model.registry import TOWERS
from gpsd_dist.tables.collections import Tables, lookup_tables
from tests.helpers.synthetic import make_manifest

ITEMS_ONLY = dataclasses.replace(
    make_manifest(table_rows={"item": 3953}),
    features=(schema.Feature("item", ("history", "candidate"), table="item"),),
    tasks=(schema.Task("click"),),
)


def from_leaf(leaf, *overrides):
    stage = "configs/stage/pretrain.gin"
    files = ["--gin_file", stage, "--gin_file", f"configs/model/{leaf}.gin", "--gin.DATA_DIR=d", "--gin.OUTPUT_DIR=o"]
    return load_run_config([*files, *overrides]).run


@pytest.mark.parametrize(
    ("leaf", "published"), [("sasrec_ml1m", 238_800), ("hstu_ml1m", 234_400), ("hstu_large_ml1m", 313_000)]
)
def test_parameter_count_on_movielens_1m_is_the_published_one(leaf, published):
    """An item table of 3,953 rows (ids up to 3,952) and 211 positions, all 50 wide."""
    run = from_leaf(leaf)
    with torch.device("meta"):
        sharded = lookup_tables(ITEMS_ONLY, run.tables, with_candidates=False)
        model = NextItemModel(ITEMS_ONLY, run.tables, run.model, sharded, ())
    [table] = sharded
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert table.num_rows * run.tables.embedding_dim + dense == published
    assert model.backbone.tower.positions.table.weight.shape == (211, 50)


def test_the_item_table_of_width_50_is_stored_with_52_columns():
    run = from_leaf("hstu_ml1m")
    tables = Tables((ITEMS_ONLY.table("item"),), (), run.tables, torch.device("meta"))
    assert tables.trainable.embeddings["item"].weight.shape == (3953, 52)


def test_without_times_hstu_has_no_time_weights():
    run = from_leaf("hstu_ml1m", "--gin.ModelConfig.time_bias=False")
    with torch.device("meta"):
        tower = TOWERS["hstu"](run.model, 1)
    assert sum(p.numel() for p in tower.parameters()) == 234_400 - 3953 * 50 - 2 * 129


def build(name, **options):
    torch.manual_seed(0)
    return TOWERS[name](ModelConfig(name, 2, 64, 4, max_positions=400, **options), 1)


def test_initial_weights_of_sasrec():
    for name, parameter in build("sasrec", ffn_width=128).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name.startswith("positions"):
            assert parameter.abs().max() <= 2 / 8 and parameter.std().item() == pytest.approx(0.88 / 8, rel=0.05)
        else:  # Xavier: sqrt(2 / (fan-in + fan-out)); queries, keys and values are one matrix [3 D, D]
            fans = 4 * 64 if "query" in name or "key_value" in name else sum(parameter.shape)
            assert parameter.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.05), name


def test_initial_weights_of_hstu():
    for name, parameter in build("hstu", head_width=32).named_parameters():
        if name.endswith("out.bias"):
            assert (parameter == 0).all(), name
        elif name.endswith("out.weight"):
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.98 * bound < parameter.abs().max() <= bound, name
        elif not name.startswith("positions"):
            spread = 0.25 if "time_bias" in name else 0.08  # of 129 draws
            assert parameter.std().item() == pytest.approx(0.02, rel=spread), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sasrec", {"head_width": 8}),
        ("sasrec", {"time_bias": False}),
        ("hstu", {"ffn_width": 8}),
        ("transformer", {"head_width": 8}),
        ("transformer", {"ffn_width": 8}),
        ("transformer", {"time_bias": False}),
    ],
    ids=str,
)
def test_an_option_of_another_tower_is_refused(name, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} .* has no effect on '{name}'"):
        Backbone(ITEMS_ONLY, TablesConfig(), ModelConfig(name, **options), (ITEMS_ONLY.table("item"),))


@pytest.mark.parametrize(("name", "dropout"), [("transformer", 0.3), ("sasrec", 0.0), ("hstu", 0.0)])
def test_inputs_are_dropped_once(name, dropout):
    """SASRec and HSTU do it themselves, after the positions are added."""
    run = from_leaf("hstu_ml1m", f"--gin.ModelConfig.name={name}", "--gin.DROPOUT=0.3")
    sharded = lookup_tables(ITEMS_ONLY, run.tables, with_candidates=True)
    model = RankingModel(ITEMS_ONLY, run.tables, run.model, sharded, ("click",))
    assert model.backbone.dropout.p == dropout
    assert name == "transformer" or model.backbone.tower.positions.dropout.p == 0.3
