"""What `parametrization = "by_width"` changes: starting values, the scale of tokens and of sums, and nothing else."""

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.model.registry import TOWERS
from gpsd_dist.tables.collections import lookup_tables
from tests.helpers.synthetic import make_manifest

WIDTH, HEADS = 32, 4
TABLES = TablesConfig(embedding_dim=WIDTH, small_table_max_rows=20)


def build(name: str, parametrization: str) -> RankingModel:
    torch.manual_seed(0)
    manifest = make_manifest()
    config = ModelConfig(name, 2, WIDTH, HEADS, max_positions=40, parametrization=parametrization)
    return RankingModel(manifest, TABLES, config, lookup_tables(manifest, TABLES, True), ("click",))


def query_and_key(model: RankingModel) -> tuple[torch.Tensor, torch.Tensor]:
    block = model.backbone.tower.blocks[0]
    weight = block.qkv.weight if hasattr(block, "qkv") else block.uvqk.weight
    parts = weight.detach().chunk(len(weight) // WIDTH)
    return parts[:2] if hasattr(block, "qkv") else parts[2:]


@pytest.mark.parametrize("name", ["transformer", "hstu"])
def test_half_of_the_heads_look_for_like_tokens(name):
    query, key = query_and_key(build(name, "by_width"))
    half = WIDTH // 2
    assert torch.equal(query[:half], key[:half]) and not torch.equal(query[half:], key[half:])
    x = torch.nn.functional.normalize(torch.randn(50, WIDTH), dim=1) * WIDTH**0.5
    logits = (x @ query[:half].T) @ (x @ key[:half].T).T / half**0.5
    others = logits[~torch.eye(50, dtype=torch.bool)]
    assert logits.diagonal().mean() > 3 * others.abs().mean()
    plain, _ = query_and_key(build(name, "official"))
    assert plain.std().item() == pytest.approx(0.02, rel=0.1)


def test_one_head_is_a_half():
    config = ModelConfig("transformer", 1, WIDTH, 1, parametrization="by_width")
    manifest = make_manifest()
    query, key = query_and_key(
        RankingModel(manifest, TABLES, config, lookup_tables(manifest, TABLES, True), ("click",))
    )
    assert torch.equal(query, key)


@pytest.mark.parametrize("name", ["transformer", "hstu", "sasrec", "deepfm", "din", "dien", "dmin", "wukong"])
def test_heads_start_from_fan_in_and_official_ones_from_init_std(name):
    for parametrization in ("by_width", "official"):
        first = build(name, parametrization).heads.mlps["click"][0]
        expected = first.in_features**-0.5 if parametrization == "by_width" else 0.02
        assert first.weight.std().item() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("name", "scale"), [("din", WIDTH**0.5), ("wukong", WIDTH**0.5), ("transformer", 1), ("hstu", 1)]
)
def test_towers_without_a_norm_scale_their_tokens(name, scale):
    assert build(name, "by_width").backbone.token_scale == pytest.approx(scale)
    assert build(name, "official").backbone.token_scale == 1


@pytest.mark.parametrize("name", ["dien", "dmin"])
@pytest.mark.parametrize(
    ("parametrization", "revision", "is_scaled"),
    [("by_width", 3, True), ("by_width", 2, False), ("official", 3, False)],
)
def test_sum_of_a_history_is_of_the_size_of_one_event(name, parametrization, revision, is_scaled):
    """Last three parts of a state: the sum, its product with the candidate, the candidate. An empty history is zero."""
    config = ModelConfig(name, 2, WIDTH, HEADS, parametrization=parametrization, revision=revision)
    tower = TOWERS[name](config, 2)
    lengths = np.array([0, 4, 9])
    x_SFD = torch.randn(9 + 4 + 3, 2, WIDTH)
    state = tower(x_SFD, Packing.from_lengths(lengths, np.array([1, 1, 1])), candidates_only=True)
    total, product, candidate = state[:, -6 * WIDTH :].chunk(3, dim=1)
    sums = torch.stack((torch.zeros(2, WIDTH), x_SFD[:4].sum(0), x_SFD[4:13].sum(0))).flatten(1)
    expected = sums / torch.tensor([[1.0], [2.0], [3.0]]) if is_scaled else sums
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(product, expected * x_SFD[13:].flatten(1))
    torch.testing.assert_close(candidate, x_SFD[13:].flatten(1))
