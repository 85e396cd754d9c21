"""Pretraining without the last token of every history in the tower: the same losses and gradients as with it.

Nothing is predicted from that token, and a causal tower shows it to no other. float32; the sums are the same, but
products see other sizes: 2e-6 of the largest value was found, and a time that is lost gives 1e-2 of HSTU's gradients.
"""

import numpy as np
import pytest
import torch

from gpsd_dist.config import ModelConfig, PretrainConfig, RunConfig, TablesConfig
from gpsd_dist.config.model import models_with
from gpsd_dist.config.training import NEGATIVES_PER
from gpsd_dist.data import collate
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.model.gpsd import NextItemModel
from gpsd_dist.stages.pretrain import Pretrain
from gpsd_dist.tables.collections import Tables, lookup_tables
from tests.helpers.reference import fill_
from tests.helpers.synthetic import make_manifest, make_rows

MANIFEST = make_manifest()
TABLES = TablesConfig(embedding_dim=16)
SHARDED = lookup_tables(MANIFEST, TABLES, with_candidates=False)


def keep_all(offsets):
    return np.ones(int(offsets[-1]), bool), np.diff(offsets)


def sums_and_gradients(model_config, negatives_per, token_multiple):
    rows = make_rows(MANIFEST, "pretrain", seed=0, num_rows=20)
    names = tuple(table.name for table in SHARDED)
    options = {"negatives_per": negatives_per, "num_negative_groups": 2, "num_negatives": 8, "seed": 3}
    (batch,) = collate.Collate(MANIFEST, names, 20, False, token_multiple=token_multiple, **options)(
        rows, BatchKey(0, 0, 0)
    )
    run = RunConfig("pretrain", "data", "out", pretrain=PretrainConfig(auxiliary=("category",)))
    tables = fill_(Tables(SHARDED, (), TABLES, torch.device("cpu")))
    model = fill_(NextItemModel(MANIFEST, TABLES, model_config, SHARDED, ("category",)))
    sums = Pretrain(run, MANIFEST).loss_sums(model, tables(batch.lookup), batch)
    sums.sum().backward()
    named = [*model.named_parameters(), *tables.named_parameters()]
    return batch, sums.detach(), {name: parameter.grad for name, parameter in named}


@pytest.mark.parametrize("negatives_per", NEGATIVES_PER)
@pytest.mark.parametrize(
    ("name", "token_multiple"), [*((name, 0) for name in models_with("is_generative")), ("transformer", 64)]
)
def test_losses_and_gradients_are_those_of_whole_histories(monkeypatch, name, token_multiple, negatives_per):
    model = ModelConfig(name=name, layers=2, width=16, heads=2)
    short, sums, gradients = sums_and_gradients(model, negatives_per, token_multiple)
    monkeypatch.setattr(collate, "without_last", keep_all)
    whole, wanted_sums, wanted = sums_and_gradients(model, negatives_per, token_multiple)
    assert whole.num_read_tokens == short.num_read_tokens == whole.packing.num_history_tokens
    assert short.packing.num_history_tokens == short.num_read_tokens - int((whole.packing.history_length_B > 0).sum())
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-6, atol=0)
    for key, gradient in wanted.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            gradients[key], gradient, rtol=0, atol=1e-5 * largest, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert largest > 1e-4 or not gradient.any(), f"{key} does not test anything"
