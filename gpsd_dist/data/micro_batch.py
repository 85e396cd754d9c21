"""Holds one part of a step's rows while `collate.py` makes a batch of it, and says which history tokens do what.

In pretraining the last token of a history is a target alone: nothing follows that its state could predict, so the tower
does not run on it. Shape letters: B requests, T history tokens, M next-item positions, G sets of negatives, N negatives
per set.
"""

import dataclasses

import numpy as np
import torch

from gpsd_dist.batch.batch import NextItem
from gpsd_dist.batch.packing import Packing, cuts
from gpsd_dist.batch.padding import PaddedPacking, PaddedTargets
from gpsd_dist.batch.row_layout import ranges
from gpsd_dist.data.negatives import Mixed, Sampler, group_offsets, log_q
from gpsd_dist.features import Values
from gpsd_dist.schema import NUM_RESERVED_ROWS


@dataclasses.dataclass
class MicroBatch:
    """Holds the columns of one batch while it is made."""

    order: np.ndarray
    packing: Packing
    columns: dict[str, dict]  # place -> feature -> table indices or numbers (`Values`)
    labels: dict[str, np.ndarray]
    sampling: dict[str, np.ndarray]
    scalars: dict[str, np.ndarray]  # Columns that are no features: column -> int64 [B]
    history_time_s: np.ndarray
    target_token_M: np.ndarray  # History tokens that the ones before them predict
    is_input_T: np.ndarray | None  # bool: history tokens that the tower runs on; None: all
    rows: dict[str, dict] = dataclasses.field(default_factory=dict)
    """`columns` with indices replaced by rows of the lookup."""
    negative_item_GN: np.ndarray | None = None
    negative_row_GN: np.ndarray | None = None  # Rows of the negatives in the lookup

    def of_tower(self, columns: dict[str, Values]) -> dict[str, Values]:
        """Cuts columns of history tokens down to those that the tower runs on."""
        if self.is_input_T is None:
            return columns
        return {name: _kept(column, self.is_input_T) for name, column in columns.items()}

    def next_item(self, item: str, negatives_per: str, sampler: Sampler | Mixed, with_times: bool) -> NextItem:
        """Says where and what to predict, once negatives have been drawn. `item`: the item feature."""
        target_M, negative_GN = self.target_token_M, self.negative_item_GN
        assert negative_GN is not None
        token_M = target_M - 1
        if self.is_input_T is not None:  # places among the tokens that the tower runs on
            token_M = (np.cumsum(self.is_input_T) - 1)[token_M]
        targets = {name: row for name, row in self.rows["history"].items() if not isinstance(row, tuple)}
        return NextItem(
            token_M=torch.from_numpy(token_M),
            target={name: torch.from_numpy(row[target_M]) for name, row in targets.items()},
            item_M=torch.from_numpy(self.columns["history"][item][target_M]),
            group_offsets=group_offsets(negatives_per, token_M, self.packing, len(negative_GN)),
            negative_item_GN=torch.from_numpy(negative_GN),
            negative_row_GN=torch.from_numpy(self.negative_row_GN),
            negative_log_q_GN=log_q(sampler, negative_GN),
            time_s_M=torch.from_numpy(self.history_time_s[target_M]) if with_times else None,
        )


def without_last(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out the last token of every history: (bool [T]: the others, their numbers [B])."""
    is_input_T, length = np.ones(int(offsets[-1]), bool), np.diff(offsets)
    is_input_T[offsets[1:][length > 0] - 1] = False
    return is_input_T, np.maximum(length - 1, 0)


def _kept(column: Values, is_kept_T: np.ndarray) -> Values:
    if not isinstance(column, tuple):
        return column[is_kept_T]
    values, offsets = column
    size_T = np.diff(offsets)
    return values[np.repeat(is_kept_T, size_T)], cuts(size_T[is_kept_T])


def with_targets(padded: PaddedPacking | None, next_item: NextItem) -> PaddedPacking | None:
    """Adds the places of next-item positions, ceil(T' / G) in each group; the groups must be equal parts of them.

    Without padding or positions there is nothing to add.
    """
    if padded is None or not len(next_item.token_M):
        return padded
    group_offsets = next_item.group_offsets
    assert group_offsets is not None
    num_groups = len(group_offsets) - 1
    size, count_G = -(-padded.packing.num_history_tokens // num_groups), np.diff(group_offsets)
    assert count_G.max() <= size, (group_offsets, size)
    place_M = ranges(size * np.arange(num_groups), count_G)
    token, source = np.zeros((2, size * num_groups), np.int64)
    token[place_M] = padded.place_S.numpy()[next_item.token_M.numpy()]
    source[place_M] = np.arange(len(place_M))
    is_real = np.zeros(len(token), bool)
    is_real[place_M] = True
    offsets = tuple(range(0, len(token) + 1, size))
    token_M, source_M, is_real_M = (torch.from_numpy(array) for array in (token, source, is_real))
    return dataclasses.replace(padded, targets=PaddedTargets(token_M, source_M, is_real_M, offsets))


def next_item_targets(offsets: np.ndarray, item_T: np.ndarray) -> np.ndarray:
    """Finds the history tokens that the token before them predicts, if their item is known: int64 [M]."""
    # An unknown item is no target: many items share that row, and predicting it would teach nothing.
    is_target = item_T >= NUM_RESERVED_ROWS
    # Nothing predicts a history's first token: the packed token before it is of another request.
    is_target[offsets[:-1][np.diff(offsets) > 0]] = False
    return np.flatnonzero(is_target)


def indices(column: Values) -> np.ndarray:
    """Returns the values of a column without the offsets of a bag."""
    return column[0] if isinstance(column, tuple) else column
