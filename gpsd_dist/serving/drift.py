"""Measures what tells drift: means over requests, on the training split when exporting and on what a server gets.

Shape letters: B requests, C candidates.
"""

import collections.abc
import sys
import typing

import numpy as np

from gpsd_dist.schema import UNKNOWN_INDEX, Manifest
from gpsd_dist.serving.tokens import Tokens

STATISTICS_NAME = "statistics.json"


def means(manifest: Manifest, tokens: Tokens, logits: collections.abc.Mapping[str, np.ndarray]) -> dict[str, float]:
    """Computes the mean length of histories and number of candidates; per feature the share of values that read the
    unknown row, or the mean of its standardised numbers; per task the mean probability. Nothing where there is none.
    """
    found = {
        "history_length": tokens.history_length_B,
        "candidates": tokens.candidate_count_B,
        **{f"probability {task}": 1 / (1 + np.exp(-logit_C.astype(np.float64))) for task, logit_C in logits.items()},
    }
    for feature in manifest.features:
        parts = [tokens.columns[place][feature.name] for place in feature.places]
        values = np.concatenate([part[0] if isinstance(part, tuple) else part for part in parts])
        if feature.table is None:
            found[f"mean {feature.name}"] = values
        else:
            found[f"unknown {feature.name}"] = values == UNKNOWN_INDEX
    return {name: float(np.mean(values)) for name, values in found.items() if len(values)}


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Computes quantiles of some numbers; nothing for none."""
    shares = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
    return dict(zip(map(str, shares), map(float, np.quantile(values, shares)), strict=True)) if len(values) else {}


def reference(statistics: dict[str, typing.Any]) -> dict[str, float]:
    """Reads the means of the training split from the content of `statistics.json`; leaves out what is not finite."""
    found = statistics.get("means")
    pairs = found.items() if isinstance(found, dict) else ()
    largest = sys.float_info.max
    return {name: float(v) for name, v in pairs if isinstance(v, int | float) and abs(v) <= largest}
