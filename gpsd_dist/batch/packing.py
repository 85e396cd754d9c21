"""Plans the geometry of a packed batch: where each request's tokens sit when there is no padding in any tensor.

Packed order: the T history tokens of all requests, then the C candidate tokens of all requests -> [T + C, D].
Everything is computed once per batch on the host (in the loader's threads), so that no layer has to ask the GPU.

Shape letters: B requests, T history tokens, C candidates, S = T + C tokens, W width of a length bucket.
"""

import dataclasses
import functools
import typing

import numpy as np
import torch

from gpsd_dist.batch.row_layout import AttentionRows, plan_rows
from gpsd_dist.batch.transfer import to_device
from gpsd_dist.batch.uncompiled import uncompiled

_FIRST_WIDTH, _GROWTH = 8, 1.5  # bucket widths 8, 12, 18, 27, ...: 1.1-2x faster than exact lengths, ~15 % padding
MAX_MASKED_CANDIDATES = 8  # up to here one masked call over history and candidates is faster; untuned above 2


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Groups consecutive requests whose histories fit into W slots; only attention in the bucket sees padded slots."""

    stays_on_host: typing.ClassVar = True  # `Packing.device_buckets` copies it
    num_requests: int  # n
    width: int  # W, the longest history in the bucket (tokens); may be 0
    num_tokens: int  # t, history tokens of the bucket; consecutive in the batch
    num_candidates: int  # c, candidates of the bucket; consecutive in the batch
    max_candidates: int  # K, the largest number of candidates of a request in the bucket
    history: "Slots | None"  # How t tokens fill n x W slots; None if every slot holds its token (t = n W)
    candidate: "Slots | None"  # How c candidates fill n x K slots; None if every slot holds its candidate
    candidate_mask: torch.Tensor | None
    """bool [n, 1, K, W + K]: keys of a candidate: its history and itself; None for no or many candidates."""


@dataclasses.dataclass(frozen=True)
class Slots:
    """Lays n consecutive jagged rows out as a padded view."""

    entry: torch.Tensor
    """int64 [n * width]: the entry in each slot, counted from the bucket's first; any valid entry where padded."""
    is_entry: torch.Tensor  # bool [n, width]: the slot is not padding
    slot: torch.Tensor  # int64 [entries]: slot of each entry


@dataclasses.dataclass(frozen=True)
class Packing:
    """Holds offsets, positions and length buckets of one packed batch; requests are sorted by history length."""

    history_offsets: torch.Tensor  # int64 [B + 1]
    candidate_offsets: torch.Tensor  # int64 [B + 1]
    position_S: torch.Tensor
    """int64 [T + C]: 0, 1, ... inside a history; a candidate sits right after its history (position = its length)."""
    request_C: torch.Tensor  # int64 [C]: request of each candidate
    num_history_tokens: int
    num_candidates: int
    max_history_length: int
    max_candidates: int  # The most candidates of a request
    candidate_key_count: int  # Sum over candidates of history length + 1: keys that candidates attend to
    buckets: tuple[Bucket, ...]
    """Consecutive, covering all requests. Always filled, even where only CUDA kernels run: that takes microseconds.
    Their tensors stay on the host; whoever reads them takes `device_buckets`."""
    history_length_B: np.ndarray
    """int64 [B], ascending. Stays on the host: recurrent models need sizes there without asking the GPU."""
    candidate_count_B: np.ndarray  # int64 [B]. Stays on the host.

    @classmethod
    def from_lengths(cls, history_length_B: np.ndarray, candidate_count_B: np.ndarray) -> "Packing":
        """Plans a batch. Both int [B]; history lengths must ascend."""
        assert (np.diff(history_length_B) >= 0).all(), "requests must be sorted by history length"
        history_offsets, candidate_offsets = cuts(history_length_B), cuts(candidate_count_B)
        num_tokens, num_candidates = int(history_offsets[-1]), int(candidate_offsets[-1])
        num_requests = len(history_length_B)
        request_C = np.repeat(np.arange(num_requests), candidate_count_B)
        position_S = np.arange(num_tokens + num_candidates)
        position_S[:num_tokens] -= np.repeat(history_offsets[:-1], history_length_B)
        position_S[num_tokens:] = history_length_B[request_C]
        return cls(
            history_offsets=torch.from_numpy(history_offsets),
            candidate_offsets=torch.from_numpy(candidate_offsets),
            position_S=torch.from_numpy(position_S),
            request_C=torch.from_numpy(request_C),
            num_history_tokens=num_tokens,
            num_candidates=num_candidates,
            max_history_length=int(history_length_B[-1]) if num_requests else 0,
            max_candidates=int(candidate_count_B.max(initial=0)),
            candidate_key_count=int(history_length_B[request_C].sum()) + num_candidates,
            buckets=tuple(_buckets(history_length_B, history_offsets, candidate_count_B, candidate_offsets)),
            history_length_B=history_length_B,
            candidate_count_B=candidate_count_B,
        )

    @functools.cached_property
    def rows(self) -> AttentionRows | None:
        """Lays attention out for a CPU, when it is first needed; None: attend in `buckets`."""
        return plan_rows(self.history_length_B, self.candidate_count_B)

    @functools.cached_property
    def device_buckets(self) -> tuple[Bucket, ...]:
        """Copies the buckets to the device of the batch, when they are first read: flash and HSTU kernels never do."""
        return to_device(self.buckets, self.history_offsets.device, with_host_parts=True)

    @property
    def num_requests(self) -> int:
        """Counts the requests (B)."""
        return len(self.history_offsets) - 1

    @property
    def request_T(self) -> torch.Tensor:
        """Names the request of each history token: int64 [T]. The host knows their number, so there is no GPU sync."""
        request_B = torch.arange(self.num_requests, device=self.history_offsets.device)
        return torch.repeat_interleave(request_B, self.history_offsets.diff(), output_size=self.num_history_tokens)

    @property
    def num_pairs(self) -> int:
        """Counts the pairs of a candidate and a token of its own history."""
        return self.candidate_key_count - self.num_candidates

    @uncompiled
    def without_candidates(self) -> "Packing":
        """Returns the histories alone, without a candidate."""
        none: dict[str, typing.Any] = {
            "num_candidates": 0,
            "max_candidates": 0,
            "candidate": None,
            "candidate_mask": None,
        }
        return dataclasses.replace(
            self,
            candidate_offsets=torch.zeros_like(self.candidate_offsets),
            position_S=self.position_S[: self.num_history_tokens],
            request_C=self.request_C[:0],
            num_candidates=0,
            max_candidates=0,
            candidate_key_count=0,
            buckets=tuple(dataclasses.replace(bucket, **none) for bucket in self.buckets),
            candidate_count_B=np.zeros_like(self.candidate_count_B),
        )


def cuts(lengths: np.ndarray) -> np.ndarray:
    """Adds lengths up to the offsets of jagged rows: int64 [rows + 1], from 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _buckets(history_length_B, history_offsets, candidate_count_B, candidate_offsets) -> typing.Iterator[Bucket]:
    """Cuts the sorted requests where the length passes the next bucket width."""
    start, limit = 0, _FIRST_WIDTH
    while start < len(history_length_B):
        stop = int(np.searchsorted(history_length_B, limit, side="right"))
        limit = int(np.ceil(limit * _GROWTH))
        if stop == start:
            continue
        width, max_candidates = int(history_length_B[stop - 1]), int(candidate_count_B[start:stop].max())
        history = _slots(history_offsets[start : stop + 1], width)
        yield Bucket(
            num_requests=stop - start,
            width=width,
            num_tokens=int(history_offsets[stop] - history_offsets[start]),
            num_candidates=int(candidate_offsets[stop] - candidate_offsets[start]),
            max_candidates=max_candidates,
            history=history,
            candidate=_slots(candidate_offsets[start : stop + 1], max_candidates),
            candidate_mask=_candidate_mask(history, stop - start, width, max_candidates),
        )
        start = stop


def _slots(offsets: np.ndarray, width: int) -> Slots | None:
    """Builds the padded view [n, width] of n consecutive jagged rows; None if nothing is padded."""
    num_rows, num_entries = len(offsets) - 1, int(offsets[-1] - offsets[0])
    if num_entries == num_rows * width:
        return None
    offsets, slot_W = offsets - offsets[0], np.arange(width)
    is_entry = slot_W[None] < np.diff(offsets)[:, None]
    entry = offsets[:-1, None] + slot_W[None]
    last_rows = entry[np.searchsorted(offsets[:-1], num_entries - width, side="right") :]  # may pass the last entry
    np.minimum(last_rows, max(num_entries - 1, 0), out=last_rows)
    return Slots(
        torch.from_numpy(entry.reshape(-1)), torch.from_numpy(is_entry), torch.from_numpy(np.flatnonzero(is_entry))
    )


def _candidate_mask(history: Slots | None, num_requests: int, width: int, max_candidates: int) -> torch.Tensor | None:
    """Builds `Bucket.candidate_mask`. A padded candidate slot attends to itself, and its output is dropped."""
    if not 0 < max_candidates <= MAX_MASKED_CANDIDATES:
        return None
    mask = torch.ones(num_requests, 1, max_candidates, width + max_candidates, dtype=torch.bool)
    if history is not None:
        mask[..., :width] = history.is_entry[:, None, None]
    mask[..., width:] = torch.eye(max_candidates, dtype=torch.bool)
    return mask
