"""Draws the negatives of next-item prediction, and says which positions share a set of them. arXiv:2506.03699, 3.2.

Shape letters: M next-item positions, G sets of negatives, N negatives per set, V rows of the item table.
"""

import typing

import numpy as np
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.schema import NUM_RESERVED_ROWS, Manifest

_MANAGED_DRAW_LIMIT = 1 << 62  # the step reduces these numbers modulo the occupied rows, so they must dwarf any table
Sampler: typing.TypeAlias = typing.Callable[[np.random.Generator, int, int, int], np.ndarray]
"""(generator, G, N, limit) -> int64 [G, N] in 2 .. limit - 1. Another distribution than the uniform one needs its log Q
taken from the logits: `Mixed.log_q`."""


def uniform(random: np.random.Generator, num_sets: int, num_negatives: int, limit: int) -> np.ndarray:
    """Draws every known item with the same probability, with replacement."""
    return random.integers(NUM_RESERVED_ROWS, limit, (num_sets, num_negatives))


class Mixed:
    """Draws the part `popular_share` by the number of events of an item, and the others uniformly."""

    def __init__(self, popular_share: float, event_V: np.ndarray):
        """`event_V`: events of each item, int64. ValueError if they are wanted, and there are none."""
        event_V = np.where(np.arange(len(event_V)) < NUM_RESERVED_ROWS, 0, event_V)
        if popular_share and not event_V.any():
            raise ValueError("popular_share draws by the events of split 'pretrain', which has none; leave it out")
        probability_V = np.full(len(event_V), (1 - popular_share) / max(len(event_V) - NUM_RESERVED_ROWS, 1))
        if popular_share:
            probability_V += popular_share * event_V / event_V.sum()
        self.popular_share, self._until_V = popular_share, np.cumsum(event_V)
        self._log_q_V = np.log(probability_V).astype(np.float32)

    def __call__(self, random: np.random.Generator, num_sets: int, num_negatives: int, limit: int) -> np.ndarray:
        """Draws int64 [G, N]."""
        item_GN = uniform(random, num_sets, num_negatives, limit)
        if not self.popular_share:
            return item_GN
        is_popular_GN = random.random(item_GN.shape) < self.popular_share
        event_GN = random.integers(0, self._until_V[-1], item_GN.shape)
        return np.where(is_popular_GN, np.searchsorted(self._until_V, event_GN, side="right"), item_GN)

    def log_q(self, item_GN: np.ndarray) -> np.ndarray:
        """Returns log(N x the probability of drawing each of these items), float32 [G, N]."""
        return self._log_q_V[item_GN] + np.float32(np.log(item_GN.shape[1]))


def log_q(sampler: Sampler | Mixed, item_GN: np.ndarray) -> torch.Tensor | None:
    """Returns what is taken from the logits of draws; None for uniform ones, which stay as they are."""
    return torch.from_numpy(sampler.log_q(item_GN)) if isinstance(sampler, Mixed) else None


def draw_limit(manifest: Manifest) -> int:
    """Returns the bound of the draws: the rows of the item table; for a managed one, random numbers for the step.

    Which rows of a managed table hold an item is known in the step only, so there the draws become rows.
    """
    table = manifest.feature(manifest.item_feature).table
    is_managed = manifest.unbounded.get(table) == "managed"
    return _MANAGED_DRAW_LIMIT if is_managed else manifest.table(table).num_rows


def group_offsets(negatives_per: str, token_M: np.ndarray, packing: Packing, num_sets: int) -> tuple[int, ...] | None:
    """Returns G + 1 cuts of the M positions: those between two cuts share a set. None: each position has its own."""
    if negatives_per == "position":
        return None
    if negatives_per == "request":
        return tuple(np.searchsorted(token_M, packing.history_offsets.numpy()).tolist())
    # Any partition of the positions will do, because all sets are drawn alike. Equal parts keep the largest block of
    # logits small.
    return tuple(np.linspace(0, len(token_M), num_sets + 1).astype(np.int64).tolist())
