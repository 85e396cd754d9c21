"""Says what HSTU's attention bias is made of: positions, times of events, and their buckets (arXiv:2402.17152, 3.2).

Shape letters: T history tokens, C candidates, S = T + C tokens, P positions, n requests of a bucket, W slots of a
history.
"""

import dataclasses

import torch

from gpsd_dist.batch.packing import Packing

NUM_TIME_BUCKETS = 129
LOG_STEP = 0.301  # of the authors' code: a bucket ends where the next is 1.35 times as long ago
UNKNOWN_BUCKET = NUM_TIME_BUCKETS - 1  # one of both times is not known; a known pair gets here after 10^9 years


@dataclasses.dataclass(frozen=True)
class EventTimes:
    """Epoch seconds int64, -1 unknown."""

    query_S: torch.Tensor
    """When the event happens that a token predicts: of a history token the next event's time, of the last one and of
    a candidate the request's."""
    key_S: torch.Tensor
    """When a token's own event happened; of a candidate the request's time."""


@dataclasses.dataclass(frozen=True)
class BiasWeights:
    """Of one layer."""

    position: torch.Tensor
    """float [2 P - 1]: entry P - 1 + key position - query position; with causal attention the first P are used."""
    time: torch.Tensor | None
    """float [NUM_TIME_BUCKETS], or None without a time bias."""


def time_bucket(query_s: torch.Tensor, key_s: torch.Tensor) -> torch.Tensor:
    """int64 bucket of every pair (broadcast): floor(ln(max(|query - key|, 1)) / 0.301), at most 128.

    A pair with an unknown time is in bucket 128, which no pair of real times reaches.
    """
    gap = (query_s - key_s).abs().clamp(min=1)
    bucket = (gap.float().log() / LOG_STEP).long().clamp(max=NUM_TIME_BUCKETS - 1)
    return bucket.masked_fill((query_s < 0) | (key_s < 0), UNKNOWN_BUCKET)


@dataclasses.dataclass(frozen=True)
class BucketPairs:
    """Time buckets of one length bucket's pairs."""

    history_nWW: torch.Tensor
    """int64 [n, W, W], query x key."""
    candidate_nW: torch.Tensor
    """int64 [n, W]: a request's candidates share their time."""


@dataclasses.dataclass(frozen=True)
class Relations:
    """What the tokens of a batch are to each other: the same for all layers."""

    packing: Packing
    times: EventTimes | None
    """None without a time bias."""
    pairs: tuple[BucketPairs, ...] | None
    """What `bucketed` needs: one per length bucket of the packing; None without a time bias, or for the kernel."""


def num_positions(bias: BiasWeights) -> int:
    """P"""
    return (len(bias.position) + 1) // 2
