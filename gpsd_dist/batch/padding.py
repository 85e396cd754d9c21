"""Rounds the sizes of a packed batch up, so that compiled code and CUDA graphs meet few shapes.

The padding is further requests that nothing reads; real tokens get the same states as without it.

Shape letters: B requests, T history tokens, C candidates, S = T + C, M next-item positions; a stroke (S') means with
padding.
"""

import dataclasses

import numpy as np
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.row_layout import ranges

_REQUEST_MULTIPLE = 64  # offsets are short: rounding them up costs nothing


@dataclasses.dataclass(frozen=True)
class PaddedPacking:
    """Holds the geometry of the padded batch, and where the real tokens are in it."""

    packing: Packing  # Geometry of S' tokens; `max_history_length` and `max_candidates` are rounded up too
    place_S: torch.Tensor  # int64 [S]: place of each real token
    place_C: torch.Tensor  # int64 [C]: place of each real candidate among the C' candidates
    targets: "PaddedTargets | None" = None  # None: the batch has no next items, or their number is not padded

    def fill(self, x_SD: torch.Tensor) -> torch.Tensor:
        """Spreads token vectors [S, D] over [S', D], zero where padded."""
        padded = x_SD.new_zeros(self.packing.num_history_tokens + self.packing.num_candidates, x_SD.shape[1])
        return padded.index_copy(0, self.place_S, x_SD)

    def fill_candidates(self, value_C: torch.Tensor, blank: float) -> torch.Tensor:
        """Spreads values of candidates [C, ...] over [C', ...], `blank` where padded."""
        padded = value_C.new_full((self.packing.num_candidates, *value_C.shape[1:]), blank)
        return padded.index_copy(0, self.place_C, value_C)

    def take(self, out: torch.Tensor, candidates_only: bool) -> torch.Tensor:
        """Takes the real tokens out: [S', D] -> [S, D], or [C', D] -> [C, D]."""
        return out.index_select(0, self.place_C if candidates_only else self.place_S)


@dataclasses.dataclass(frozen=True)
class PaddedTargets:
    """Gives the next-item positions M' places, as many in every group. M' follows from the number of padded tokens."""

    token_M: torch.Tensor  # int64 [M']: token of the padded batch whose state predicts; 0 where nothing is predicted
    source_M: torch.Tensor  # int64 [M']: which of the M positions stands here; 0 where none does
    is_real_M: torch.Tensor  # bool [M']: a position stands here
    group_offsets: tuple[int, ...]  # G + 1 cuts of M'; a group has the positions that it has without padding


def pad_packing(packing: Packing, multiple: int, longest: int) -> PaddedPacking:
    """Rounds T' and C' up to multiples of `multiple` (0 stays 0), B' of 64; no history may exceed `longest`."""
    lengths, counts = packing.history_length_B, packing.candidate_count_B
    missing_tokens, missing_candidates = (-int(n.sum()) % multiple for n in (lengths, counts))
    most = int(counts.max(initial=0))
    most = 1 << (most - 1).bit_length() if most else 0  # the next power of 2
    pieces = [(longest, 0)] * (missing_tokens // longest)
    pieces += [(missing_tokens % longest, 0)] if missing_tokens % longest else []
    pieces += [(0, most)] * (missing_candidates // max(most, 1))
    pieces += [(0, missing_candidates % most)] if missing_candidates and missing_candidates % most else []
    pieces += [(0, 0)] * (-(len(lengths) + len(pieces)) % _REQUEST_MULTIPLE)
    added = np.array(pieces, np.int64).reshape(-1, 2)
    all_lengths, all_counts = np.concatenate([lengths, added[:, 0]]), np.concatenate([counts, added[:, 1]])
    order = np.argsort(all_lengths, kind="stable")
    padded = Packing.from_lengths(all_lengths[order], all_counts[order])
    padded = dataclasses.replace(padded, max_history_length=longest, max_candidates=most)
    request_B = np.argsort(order)[: len(lengths)]  # where each real request has come to stand
    place_T = ranges(padded.history_offsets.numpy()[request_B], lengths)
    place_C = ranges(padded.candidate_offsets.numpy()[request_B], counts)
    place_S = np.concatenate([place_T, padded.num_history_tokens + place_C])
    return PaddedPacking(padded, torch.from_numpy(place_S), torch.from_numpy(place_C))
