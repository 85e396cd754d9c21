"""Defines the parts of HSTU's attention bias: positions, times of events, and their buckets (arXiv:2402.17152, 3.2).

Shape letters: T history tokens, C candidates, S = T + C tokens, P positions, n requests of a bucket, W slots of a
history.
"""

import dataclasses

import torch

from gpsd_dist.batch.packing import Packing

NUM_TIME_BUCKETS = 129
LOG_STEP = 0.301  # from the authors' code: each bucket reaches 1.35 times as far back as the one before
UNKNOWN_BUCKET = NUM_TIME_BUCKETS - 1  # for pairs with an unknown time; known times would be 10^9 years apart


@dataclasses.dataclass(frozen=True)
class EventTimes:
    """Holds two times of every token, in epoch seconds int64; -1 is unknown."""

    query_S: torch.Tensor
    """Time of the event that a token predicts: the next event, or the request for the last token and candidates."""
    key_S: torch.Tensor  # Time of the token's own event; for a candidate, of the request


@dataclasses.dataclass(frozen=True)
class BiasWeights:
    """Holds the bias weights of one layer."""

    position: torch.Tensor
    """float [2 P - 1]: entry P - 1 + key position - query position; with causal attention the first P are used."""
    time: torch.Tensor | None  # float [NUM_TIME_BUCKETS], or None without a time bias


def time_bucket(query_s: torch.Tensor, key_s: torch.Tensor) -> torch.Tensor:
    """Returns the int64 bucket of every pair (broadcast): floor(ln(max(|query - key|, 1)) / 0.301), at most 128.

    A pair with an unknown time is in bucket 128, which no pair of real times reaches.
    """
    gap = (query_s - key_s).abs().clamp(min=1)
    bucket = (gap.float().log() / LOG_STEP).long().clamp(max=NUM_TIME_BUCKETS - 1)
    return bucket.masked_fill((query_s < 0) | (key_s < 0), UNKNOWN_BUCKET)


@dataclasses.dataclass(frozen=True)
class BucketPairs:
    """Holds the time buckets of all pairs in one length bucket, int64."""

    history_nWW: torch.Tensor  # query x key
    candidate_nW: torch.Tensor  # the candidates of a request share their time


@dataclasses.dataclass(frozen=True)
class PackedBuckets:
    """Holds the time buckets of all pairs of a batch for the kernel: uint8, request after request."""

    history: torch.Tensor  # of each history token with all tokens of its request: [sum of squared lengths]
    history_offsets: torch.Tensor  # int64 [B + 1]: where each request begins
    candidate: torch.Tensor  # of the request's time with each token of its history: [T]


@dataclasses.dataclass(frozen=True)
class Relations:
    """Relates the tokens of a batch to each other; all layers share it."""

    packing: Packing
    times: EventTimes | None  # None without a time bias
    pairs: tuple[BucketPairs, ...] | PackedBuckets | None
    """For `bucketed` one per length bucket; for the kernel all in one; None without a time bias."""


def num_positions(bias: BiasWeights) -> int:
    """Returns P."""
    return (len(bias.position) + 1) // 2
