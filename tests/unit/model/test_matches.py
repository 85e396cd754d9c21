"""How often, and how lately, a candidate's value is in its own history: against a loop over the requests."""

import math

import numpy as np
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.model.embeddings import matches


def test_matches_are_those_of_a_loop():
    random = np.random.default_rng(0)
    lengths, counts = np.array([0, 0, 1, 3, 9, 9, 30]), np.array([2, 0, 4, 3, 1, 6, 20])
    histories = [random.integers(5, size=length) for length in lengths]
    candidates = [random.integers(5, size=count) for count in counts]
    value_T, value_C = (torch.from_numpy(np.concatenate(parts)) for parts in (histories, candidates))
    expected = []
    for history, shown in zip(histories, candidates, strict=True):
        for value in shown:
            places = np.flatnonzero(history == value)
            age = len(history) - places[-1] if len(places) else math.inf
            expected.append((math.log1p(len(places)), len(places) / max(1, len(history)), 1 / age))
    found = matches(value_T, value_C, Packing.from_lengths(lengths, counts))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert found.dtype == torch.float32 and len(found) == counts.sum() and (found > 0).any() and (found == 0).any()


def test_a_batch_without_any_event_has_no_match():
    none = torch.zeros(0, dtype=torch.int64)
    found = matches(none, torch.tensor([3, 3]), Packing.from_lengths(np.array([0]), np.array([2])))
    assert found.tolist() == [[0.0] * 3] * 2
