"""Are hashed draws as good as random ones? Chi-square tests, with a construction that fails them as a control.

Deterministic draws tempt one to linear keys: slot = (user + a * request + b * draw) mod slots. These are uniform, too,
and worthless: neighbours get neighbouring items. Seeds are fixed, so that a p-value is a constant: bounds do not flake.
"""

import argparse

import ibis
import numpy as np
import pyarrow as pa
import pytest
import scipy.stats

from data_pipeline import engine, negatives, vocab
from tests.unit.data_pipeline.test_splits_and_negatives import draw

NUM_USERS, NUM_REQUESTS, NUM_DRAWS, NUM_ITEMS = 4_000, 2, 4, 40
LEAST_P = 1e-4  # of some 20 p-values per run, the least is below it once in 500 runs of good draws
HOPELESS_P = 1e-30


@pytest.fixture
def running(tmp_path):
    opened = engine.Engine("duckdb", tmp_path, "1GB", 1)
    yield opened
    opened.close()


def numbered_requests(running, positive: str = "none"):
    """NUM_REQUESTS requests for each of the users u0, u1, ... (what a log with running ids looks like)."""
    users = np.repeat(np.arange(NUM_USERS), NUM_REQUESTS)
    columns = {
        "user_id": [f"u{user}" for user in users],
        "split": ["train"] * len(users),
        "num_before": np.tile(np.arange(NUM_REQUESTS) + 5, NUM_USERS),
        "item_id": [positive] * len(users),
        "time_s": np.zeros(len(users), np.int64),
    }
    return running.store(pa.table(columns))


def item_vocabulary(running, counts):
    return vocab.build(
        running, "item", ibis.memtable({"raw_id": [str(i) for i in range(len(counts))], "count": counts}), 1
    )


def hashed_draws(running, distribution: str, counts, seed: int = 0) -> np.ndarray:
    """Items [user, request, draw] of one round, nothing rejected."""
    slots, num_slots = negatives.slots(running, item_vocabulary(running, counts), distribution)
    drawn = negatives._round(numbered_requests(running), slots, num_slots, range(NUM_DRAWS), seed).execute()
    drawn["user"] = drawn.user_id.str[1:].astype(int)
    drawn = drawn.sort_values(["user", "num_before", "draw"])
    return drawn.item_id.astype(int).to_numpy().reshape(NUM_USERS, NUM_REQUESTS, NUM_DRAWS)


def linear_draws() -> np.ndarray:
    """The control: the same shape from linear keys with large odd factors."""
    user, request, draw_ = np.ogrid[:NUM_USERS, :NUM_REQUESTS, :NUM_DRAWS]
    return (user * 2654435761 + request * 40503 + draw_ * 69621) % NUM_ITEMS


def uniformity(items: np.ndarray) -> float:
    """p-value that all items are equally likely, over all draws."""
    return scipy.stats.chisquare(np.bincount(items.ravel(), minlength=NUM_ITEMS)).pvalue


def independence(one: np.ndarray, other: np.ndarray) -> float:
    """p-value that two draws say nothing about each other: all pairs (item, item) equally likely."""
    pairs = one.ravel() * NUM_ITEMS + other.ravel()
    return scipy.stats.chisquare(np.bincount(pairs, minlength=NUM_ITEMS**2)).pvalue


def p_values(items: np.ndarray) -> dict[str, float]:
    """Uniformity, and independence of neighbours along every axis."""
    found = {"uniform": uniformity(items)}
    for k in range(NUM_DRAWS):
        found[f"uniform at draw {k}"] = uniformity(items[:, :, k])
        for later in range(k + 1, NUM_DRAWS):
            found[f"draws {k}, {later}"] = independence(items[:, :, k], items[:, :, later])
    for distance in (1, 2, 3):
        found[f"users {distance} apart"] = independence(items[:-distance], items[distance:])
    found["requests of a user"] = independence(items[:, 0], items[:, 1])
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_hashed_draws_are_uniform_and_independent(running, seed):
    found = p_values(hashed_draws(running, "uniform", [1] * NUM_ITEMS, seed))
    assert len(found) == 15
    assert min(found.values()) > LEAST_P, found


def test_linear_keys_are_uniform_but_far_from_independent():
    """The control: these tests tell good from bad, and uniformity alone would not."""
    found = p_values(linear_draws())
    assert found["uniform"] > LEAST_P
    for name, p_value in found.items():
        if not name.startswith("uniform"):
            assert p_value < HOPELESS_P, name


def test_another_seed_gives_independent_draws(running, tmp_path):
    one = hashed_draws(running, "uniform", [1] * NUM_ITEMS, seed=0)
    (tmp_path / "other").mkdir()
    second = engine.Engine("duckdb", tmp_path / "other", "1GB", 1)
    other = hashed_draws(second, "uniform", [1] * NUM_ITEMS, seed=1)
    second.close()
    assert independence(one, other) > LEAST_P


def test_popular_draws_follow_the_slots_exactly(running):
    counts = [int(100_000 / rank) for rank in range(1, NUM_ITEMS + 1)]
    items = hashed_draws(running, "popularity", counts)
    expected = np.array(counts) / sum(counts) * items.size
    assert scipy.stats.chisquare(np.bincount(items.ravel(), minlength=NUM_ITEMS), expected).pvalue > LEAST_P
    assert scipy.stats.chisquare(np.bincount(items.ravel(), minlength=NUM_ITEMS)).pvalue < HOPELESS_P


def test_every_slot_is_hit_so_that_the_rarest_item_is_reachable(running):
    """2,000 items with a slot each and 32,000 draws: a slot is missed with probability exp(-16) = 1e-7."""
    items = hashed_draws(running, "uniform", [10**6] + [1] * 1_999)
    counts = np.bincount(items.ravel(), minlength=2_000)
    assert counts.min() > 0
    assert scipy.stats.chisquare(counts).pvalue > LEAST_P  # the common item gets no more than its one slot


def test_what_is_left_after_rejection_is_uniform_over_the_unseen_items(running):
    """Two items of every user (history and positive) are out: 38 of 40 remain, and each is as likely."""
    drawn, history, positive = draw(running, "uniform", NUM_USERS, NUM_ITEMS, 2)
    assert not ((drawn == history[:, None]) | (drawn == positive[:, None])).any()
    unseen = np.ones((NUM_USERS, NUM_ITEMS))
    unseen[np.arange(NUM_USERS), history] = unseen[np.arange(NUM_USERS), positive] = 0
    expected = unseen.sum(0) / (NUM_ITEMS - 2)
    for k in range(2):
        assert scipy.stats.chisquare(np.bincount(drawn[:, k], minlength=NUM_ITEMS), expected).pvalue > LEAST_P
    gap = (drawn[:, 1] - drawn[:, 0]) % NUM_ITEMS  # of the two negatives of a request: all gaps but 0
    assert scipy.stats.chisquare(np.bincount(gap, minlength=NUM_ITEMS)[1:]).pvalue > LEAST_P
    neighbour = (drawn[1:, 0] - drawn[:-1, 0]) % NUM_ITEMS
    assert scipy.stats.chisquare(np.bincount(neighbour, minlength=NUM_ITEMS)).pvalue > LEAST_P


def test_a_request_without_an_unseen_item_gets_none(running):
    """Rejection ends: the number of rounds is bounded."""
    events = running.store(pa.table({"user_id": ["a"], "item_id": ["0"], "rank": [0], "num_before": [1]}))
    requests = running.store(
        pa.table({"user_id": ["a"], "split": ["train"], "num_before": [1], "item_id": ["1"], "time_s": [0]})
    )
    slots, num_slots = negatives.slots(running, item_vocabulary(running, [1, 1]), "uniform")
    options = argparse.Namespace(num_slots=num_slots, per_positive=1, seed=0)
    drawn, num_short = negatives.draw(running, requests, events, slots, **vars(options))
    assert (drawn.count().execute(), num_short) == (0, 1)
