"""Compares each candidate with its own history, value by value: what boosted trees are given as counts.

Shape letters: T history tokens, C candidates, M rows of all tokens (T, or any number in bags), N rows of candidates.
"""

import torch

from gpsd_dist.batch.batch import Bag, Column
from gpsd_dist.batch.packing import Packing

NUM_MATCHES = 3  # numbers of a feature
_MAX_ROWS = 2**32  # more than any table has


def matches(value_T: Column, value_C: Column, packing: Packing) -> torch.Tensor:
    """Finds each candidate's value in its own history: float32 [C, 3] of log(1 + events), their share, 1 / age.

    Age 1 is the last event; 1 / age of no event is 0. Values are rows of one table; what is unknown is a value too. A
    bag has, for each number, the best of its elements, and 0 if it is empty. One sort of all histories: the sizes do
    not depend on the values, so a GPU need not be waited for.
    """
    row_M, token_M = _elements(value_T)
    row_N, candidate_N = _elements(value_C)
    num_candidates = packing.num_candidates
    if not len(row_M) or not len(row_N):
        return torch.zeros(num_candidates, NUM_MATCHES, device=row_N.device)
    code_M, place_M = (packing.request_T[token_M] * _MAX_ROWS + row_M).sort(stable=True)
    request_N = packing.request_C[candidate_N]
    code_N = request_N * _MAX_ROWS + row_N
    begin_N, end_N = (torch.searchsorted(code_M, code_N, right=right) for right in (False, True))
    count_N = end_N - begin_N
    length_N = packing.history_offsets.diff()[request_N]
    # Of equal values the sort keeps the order of time, so the last of them is the latest event.
    age_N = packing.history_offsets[1:][request_N] - token_M[place_M[(end_N - 1).clamp(min=0)]]
    recency_N = torch.where(count_N > 0, 1 / age_N, 0.0)
    found_N3 = torch.stack((count_N.log1p(), count_N / length_N.clamp(min=1), recency_N), dim=1)
    if not isinstance(value_C, Bag):
        return found_N3
    best_C3 = found_N3.new_zeros(num_candidates, NUM_MATCHES)
    return best_C3.scatter_reduce(0, candidate_N[:, None].expand_as(found_N3), found_N3, "amax")


def _elements(column: Column) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the rows of a column, and the token or candidate that each belongs to: int64, both of one length."""
    if not isinstance(column, Bag):
        return column, torch.arange(len(column), device=column.device)
    place = torch.arange(len(column.offsets) - 1, device=column.rows.device)
    return column.rows, torch.repeat_interleave(place, column.offsets.diff(), output_size=len(column.rows))
