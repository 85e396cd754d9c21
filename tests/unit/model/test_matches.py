"""How often, and how lately, a candidate's value is in its own history: against a loop over the requests."""

import math

import numpy as np
import torch

from gpsd_dist.batch.batch import Bag
from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.model.embeddings import ContextEmbedder
from gpsd_dist.model.matches import NUM_MATCHES, matches
from tests.helpers.synthetic import make_manifest


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


def packed(bags: list[list[int]]) -> Bag:
    lengths = [len(bag) for bag in bags]
    rows = torch.tensor([row for bag in bags for row in bag], dtype=torch.int64)
    return Bag(rows, torch.tensor(np.cumsum([0, *lengths])))


def test_a_bag_has_the_best_of_its_elements():
    """Each of the three numbers may be another element's; an empty bag, and a request without events, have 0."""
    random = np.random.default_rng(1)
    lengths, counts = np.array([0, 1, 4, 9, 20]), np.array([3, 2, 0, 5, 9])
    # An empty bag, and bags of different sizes, in histories and candidates.
    histories, shown = (
        [[random.permutation(9)[: random.integers(4)].tolist() for _ in range(length)] for length in sizes]
        for sizes in (lengths, counts)
    )
    expected = []
    for history, bags in zip(histories, shown, strict=True):
        for bag in bags:
            best = np.zeros(3)
            for value in bag:
                places = [place for place, event in enumerate(history) if value in event]
                if places:
                    share, age = len(places) / len(history), len(history) - places[-1]
                    best = np.maximum(best, (math.log1p(len(places)), share, 1 / age))
            expected.append(best)
    columns = (packed([bag for bags in side for bag in bags]) for side in (histories, shown))
    found = matches(*columns, Packing.from_lengths(lengths, counts))
    torch.testing.assert_close(found, torch.tensor(np.array(expected), dtype=torch.float32))
    assert (found.count_nonzero(1) == 3).any() and (found == 0).all(1).any()


def test_bags_alone_are_no_values():
    """Candidates whose bags are all empty have no match, whatever the history."""
    found = matches(packed([[3], [4]]), packed([[], []]), Packing.from_lengths(np.array([2]), np.array([2])))
    assert found.tolist() == [[0.0] * 3] * 2


def test_heads_get_matches_of_every_shared_feature_and_of_bags_if_asked():
    """A run of before has matches without those of bags, and its weights must go on fitting."""
    manifest, tables = make_manifest(), TablesConfig(embedding_dim=8)
    shared = [f for f in manifest.features_in("candidate") if "history" in f.places and f.table is not None]
    bags = [f for f in shared if f.is_bag]
    none, before, full = (
        ContextEmbedder(manifest, tables, ModelConfig(context_dim=4, matches=matched, bag_matches=with_bags), ())
        for matched, with_bags in ((False, True), (True, False), (True, True))
    )
    assert 0 < len(bags) < len(shared)
    assert before.width - none.width == NUM_MATCHES * (len(shared) - len(bags))
    assert full.width - none.width == NUM_MATCHES * len(shared)
