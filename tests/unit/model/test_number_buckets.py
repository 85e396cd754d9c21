"""Buckets of numbers: which one a value falls into, and what the heads get of it."""

import dataclasses

import numpy as np
import pytest
import torch

from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.features import standardise
from gpsd_dist.model.embeddings import ContextEmbedder
from gpsd_dist.model.number_buckets import NumberBuckets
from gpsd_dist.schema import Feature
from tests.helpers.synthetic import make_manifest

COUNT = Feature("n", ("candidate",), "numerical", mean=1.5, std=0.7, log=True, quantiles=(0.0, 1.0, 7.0, 1e9))


def test_a_number_lies_above_the_quantiles_up_to_itself():
    values = np.array([-1, 0, 0.5, 1, 6, 7, 8, 1e8, 3e9], np.float32)
    buckets = NumberBuckets(COUNT, 3)
    found = buckets(torch.from_numpy(standardise(COUNT, values)))
    place_N = np.searchsorted(np.array(COUNT.quantiles), values, side="right")
    place_N[-2:] = 4  # 1e8 and 1e9 are both beyond five deviations
    assert torch.equal(found, buckets.embedding.weight[torch.from_numpy(place_N)])


def test_heads_get_a_bucket_of_every_number():
    manifest, tables = make_manifest(), TablesConfig(embedding_dim=8)
    numbers = {f.name for place in ("context", "candidate") for f in manifest.features_in(place) if f.table is None}
    measured = tuple(dataclasses.replace(f, quantiles=(0.0, 0.5)) if f.table is None else f for f in manifest.features)
    model = ModelConfig(context_dim=4, number_buckets=True)
    plain = ContextEmbedder(manifest, tables, dataclasses.replace(model, number_buckets=False), ())
    full = ContextEmbedder(dataclasses.replace(manifest, features=measured), tables, model, ())
    assert numbers and full.width == plain.width + 4 * len(numbers)
    with pytest.raises(ValueError, match="no quantiles of 'age', because an older version built them"):
        ContextEmbedder(manifest, tables, model, ())
