"""The baseline must compute what the product computes, or a ratio of the two says nothing."""

import numpy as np
import pytest
import torch

from benchmarks import datasets
from benchmarks.padded_baseline import PaddedBaseline, PaddedLoader, PaddedModel, PaddedTransformer
from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.loader import Loader
from gpsd_dist.model.transformer import Transformer
from gpsd_dist.stages import losses


@pytest.fixture
def small_source(monkeypatch):
    source = datasets.Source(12, 16, None, "", lambda random, count: random.integers(1, 13, count), 40, num_rows=64)
    monkeypatch.setitem(datasets.SOURCES, "grocery", source)
    return source


def test_padded_tower_equals_packed_tower():
    torch.manual_seed(0)
    packed, padded = (
        Transformer(ModelConfig(layers=2, width=16, heads=2), 1).double(),
        PaddedTransformer(2, 16, 2).double(),
    )
    for parameter in packed.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    padded.load_state_dict(packed.state_dict())
    length_B = np.array([1, 3, 3, 7])
    x_BLD = torch.randn(4, 9, 16, dtype=torch.float64)
    is_token = torch.arange(9) < torch.from_numpy(length_B)[:, None]
    expected = packed(x_BLD[is_token], Packing.from_lengths(length_B, np.zeros(4, np.int64)))
    # rotary positions are computed in float32 on both sides
    torch.testing.assert_close(padded(x_BLD, torch.from_numpy(length_B))[is_token], expected, atol=1e-5, rtol=1e-5)


def test_padded_item_loss_equals_the_product_with_one_group_per_request(small_source, tmp_path):
    data = datasets.prepare("pretrain", "grocery", tmp_path, tmp_path)
    collate = Collate(data.manifest, ("item",), 12, False, negatives_per="request", num_negatives=8)
    whole = Collate(data.manifest, ("item",), 12, False)

    def make_batch(rows, key):
        return *collate(rows, key), *whole(rows, key)

    with_batch = Loader(
        data.data_dir, data.manifest, "pretrain", make_batch=make_batch, columns=collate.columns(), global_batch_rows=16
    )
    batch, histories = next(iter(with_batch))
    with_batch.close()
    torch.manual_seed(0)
    model = PaddedModel(data.manifest, 1, 16, 2)
    length_B = histories.packing.history_offsets.diff()
    is_token = torch.arange(12) < length_B[:, None]
    item_BL = torch.zeros(len(length_B), 12, dtype=torch.int64)
    item_BL[is_token] = histories.history_item_T
    predicts = torch.arange(12) < length_B[:, None] - 1
    hidden_BLD = torch.randn(len(length_B), 12, 16)
    next_item = batch.next_item
    expected = losses.sampled_softmax(
        hidden_BLD[predicts][next_item.token_M],
        model.item.weight,
        next_item.item_M,
        next_item.item_M,
        next_item.negative_item_GN,
        next_item.negative_item_GN,
        next_item.group_offsets,
        0.05,
    )

    class Rows:
        item_BL = None
        negative_BN = next_item.negative_item_GN

    Rows.item_BL = item_BL
    torch.testing.assert_close(
        model._next_item_loss(hidden_BLD, Rows), expected / len(next_item.token_M), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", datasets.CANDIDATES_PER_ROW)
def test_baseline_learns_every_kind(kind, small_source, tmp_path):
    torch.manual_seed(0)
    data = datasets.prepare(kind, "grocery", tmp_path, tmp_path)
    negatives = 8 if kind == "pretrain" else 0
    loader = PaddedLoader(data.data_dir, data.manifest, data.split, batch_rows=16, num_negatives=negatives)
    baseline = PaddedBaseline(loader, data.manifest, layers=1, width=16, heads=2)
    baseline.run_steps(1)
    first = baseline.last_loss
    num_tokens = baseline.run_steps(40)
    assert num_tokens > 40 * 16
    assert baseline.last_loss < first


@pytest.mark.parametrize("kind", ["discriminative", "discriminative_k2"])
def test_rows_have_exactly_the_candidates_of_their_kind(kind, small_source, tmp_path):
    data = datasets.prepare(kind, "grocery", tmp_path, tmp_path)
    per_row = datasets.CANDIDATES_PER_ROW[kind]
    split = data.manifest.split(data.split)
    assert split.num_candidates == split.num_rows * per_row
    assert split.num_rows == small_source.num_rows * 2 // per_row
