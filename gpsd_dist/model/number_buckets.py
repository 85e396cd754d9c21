"""Embeds numbers of the heads' context by bucket, so that a loss can depend on them in any way."""

import numpy as np
import torch
from torch import nn

from gpsd_dist.features import standardise
from gpsd_dist.schema import Feature


class NumberBuckets(nn.Module):
    """Embeds the bucket of a number, between two of its quantiles over the training split."""

    def __init__(self, feature: Feature, width: int):
        """ValueError where the data have no quantiles of the feature."""
        super().__init__()
        if not feature.quantiles:
            raise ValueError(
                f"ModelConfig.number_buckets: the data have no quantiles of {feature.name!r}, because an older version "
                "built them: build the data again, or leave the option out"
            )
        edges = np.unique(standardise(feature, np.array(feature.quantiles, np.float32)))
        self.register_buffer("edges", torch.tensor(edges.tolist()))
        self.embedding = nn.Embedding(len(edges) + 1, width)

    def forward(self, number_N: torch.Tensor) -> torch.Tensor:
        """Embeds standardised numbers: float32 [N, width]. A number at an edge lies above it."""
        return self.embedding((number_N[:, None] >= self.edges).sum(dim=1))
