"""Lays a packed batch out for attention on a CPU: short requests share rows of a few slots, long ones have one each.

A row is the unit of one attention call. Most requests are far shorter than what a kernel handles well, so several of
them stand side by side in a row of `ROW_WIDTH` slots, each with its candidates behind its history, kept apart by a
mask: half the time, forward and backward, of a row per request at the lengths of Amazon Grocery.

Shape letters: B requests, S tokens in packed order (histories, then candidates), R slots of all rows, n rows of a
block, W slots per row.
"""

import dataclasses
import typing

import numpy as np
import torch

ROW_WIDTH = 32  # slots of a shared row: 16 and 48 are as fast at mean length 8, 64 takes twice as long
_GROWTH = 1.5  # of the widths of long requests' rows
_MULTIPLE = 16  # those widths are rounded up to it (a vector register of float32) where that adds an eighth at most
_MAX_MASK_ELEMENTS = 1 << 22  # 16 MiB; beyond it (many long requests) a mask costs more than it saves
# A row computes scores between candidates only to mask them, so its cost is quadratic in their number. Attention in
# buckets is linear: as fast with 32 - 64 candidates behind 50 or 200 events (L4H64A4), 1.3x at 128, 3.6x at 1000.
_MAX_ROW_CANDIDATES = 48


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """Groups rows that one attention call handles; consecutive in the slots."""

    num_rows: int  # n
    width: int  # W
    mask: torch.Tensor | None
    """float32 [n, 1, W, W], 0 or -inf; None: causal, which is enough for one request with at most one candidate."""


@dataclasses.dataclass(frozen=True)
class AttentionRows:
    """Says where every token stands."""

    blocks: tuple[RowBlock, ...]
    entry_R: torch.Tensor  # int64: token in each slot; any token where the slot is padding
    slot_S: torch.Tensor  # int64: slot of each token


def plan_rows(history_length_B: np.ndarray, candidate_count_B: np.ndarray) -> AttentionRows | None:
    """Plans the rows from lengths and counts, int64 [B].

    None, which means to attend in buckets: without tokens, for many candidates, or if the masks would be too large.
    """
    if candidate_count_B.max(initial=0) > _MAX_ROW_CANDIDATES:
        return None
    size_B = history_length_B + candidate_count_B
    num_tokens = int(size_B.sum())
    shared, single = _shared_rows(size_B), list(_single_rows(size_B, candidate_count_B))
    elements = sum(group.num_rows * group.width**2 for group in [*shared, *single] if group.needs_mask)
    if not num_tokens or elements > _MAX_MASK_ELEMENTS:
        return None
    start_B, base = np.zeros(len(size_B), np.int64), 0
    groups = [*shared, *single]
    for group in groups:
        start_B[group.requests] = base + group.start
        base += group.num_rows * group.width
    candidate_start_B = start_B + history_length_B
    slot_S = np.concatenate([ranges(start_B, history_length_B), ranges(candidate_start_B, candidate_count_B)])
    entry_R = np.zeros(base, np.int64)
    entry_R[slot_S] = np.arange(num_tokens)
    owner_R, is_candidate_R = np.full(base, -1), np.zeros(base, bool)
    num_history = int(history_length_B.sum())
    owner_R[slot_S[:num_history]] = np.repeat(np.arange(len(size_B)), history_length_B)
    owner_R[slot_S[num_history:]] = np.repeat(np.arange(len(size_B)), candidate_count_B)
    is_candidate_R[slot_S[num_history:]] = True
    blocks, base = [], 0
    for group in groups:
        span = slice(base, base + group.num_rows * group.width)
        mask = _mask(owner_R[span], is_candidate_R[span], group.width) if group.needs_mask else None
        blocks.append(RowBlock(group.num_rows, group.width, mask))
        base = span.stop
    return AttentionRows(tuple(blocks), torch.from_numpy(entry_R), torch.from_numpy(slot_S))


def row_geometry(num_requests: float, history_length: float, candidate_count: float) -> tuple[float, float] | None:
    """Estimates (slots per token, mask elements per slot) where all requests are about this long; None without rows."""
    if candidate_count > _MAX_ROW_CANDIDATES:
        return None
    size = history_length + candidate_count
    if size <= ROW_WIDTH:
        slots, mask = ROW_WIDTH / (ROW_WIDTH // max(size, 1)), float(ROW_WIDTH)
    else:
        slots = float(_rounded(int(np.ceil(size))))
        mask = slots if candidate_count > 1 else 0.0
    return None if num_requests * slots * mask > _MAX_MASK_ELEMENTS else (slots / max(size, 1e-9), mask)


class _Group(typing.NamedTuple):
    """Groups requests whose rows are alike."""

    requests: np.ndarray
    start: np.ndarray  # First slot of each request, counted from the group's first
    num_rows: int
    width: int
    needs_mask: bool


def _shared_rows(size_B: np.ndarray) -> list[_Group]:
    """Packs requests of at most ROW_WIDTH tokens, as many to a row as the largest of them allow."""
    request = np.flatnonzero((size_B > 0) & (size_B <= ROW_WIDTH))
    request = request[np.argsort(size_B[request], kind="stable")]
    per_row = ROW_WIDTH // size_B[request]  # falls along the order
    starts, num_rows = np.zeros(len(request), np.int64), 0
    for capacity in np.unique(per_row)[::-1]:
        [member] = np.nonzero(per_row == capacity)
        row = np.arange(len(member)) // capacity
        before = np.cumsum(size_B[request[member]]) - size_B[request[member]]
        starts[member] = (num_rows + row) * ROW_WIDTH + before - before[row * capacity]
        num_rows += int(row[-1]) + 1
    return [_Group(request, starts, num_rows, ROW_WIDTH, needs_mask=True)] if num_rows else []


def _single_rows(size_B: np.ndarray, candidate_count_B: np.ndarray) -> typing.Iterator[_Group]:
    """Gives every longer request a row, in groups of similar length."""
    for needs_mask in (False, True):
        request = np.flatnonzero((size_B > ROW_WIDTH) & ((candidate_count_B > 1) == needs_mask))
        request = request[np.argsort(size_B[request], kind="stable")]
        limit = ROW_WIDTH
        while len(request):
            limit = int(np.ceil(limit * _GROWTH))
            stop = int(np.searchsorted(size_B[request], limit, side="right"))
            if stop:
                member, request = request[:stop], request[stop:]
                width = _rounded(int(size_B[member[-1]]))
                yield _Group(member, np.arange(stop) * width, stop, width, needs_mask)


def _rounded(width: int) -> int:
    rounded = _MULTIPLE * -(-width // _MULTIPLE)
    return rounded if 8 * (rounded - width) <= width else width


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Joins the ranges starts[i], starts[i] + 1, ... of sizes[i] numbers each: int64."""
    return np.arange(int(sizes.sum())) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)


def _mask(owner_R: np.ndarray, is_candidate_R: np.ndarray, width: int) -> torch.Tensor:
    """Builds the mask: a token sees its own request's history up to itself, and itself. Padding sees padding."""
    owner_nW, is_candidate_nW = owner_R.reshape(-1, width), is_candidate_R.reshape(-1, width)
    sees_nWW = (owner_nW[:, :, None] == owner_nW[:, None]) & ~is_candidate_nW[:, None]
    sees_nWW &= np.tri(width, dtype=bool)
    sees_nWW |= np.eye(width, dtype=bool)
    return torch.from_numpy(np.where(sees_nWW, np.float32(0), np.float32("-inf")))[:, None]
