"""Holds one part of a step's rows while `collate.py` makes a batch of it, and says which history tokens do what.

In pretraining the last token of a history is a target alone: nothing follows that its state could predict, so the tower
does not run on it. Shape letters: B requests, T history tokens, M next-item positions, G sets of negatives, N negatives
per set.
"""

import dataclasses

import numpy as np

from gpsd_dist.batch.packing import Packing, cuts
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

    def place_in_tower(self, token_M: np.ndarray) -> np.ndarray:
        """Turns places among all history tokens into places among those that the tower runs on."""
        return token_M if self.is_input_T is None else (np.cumsum(self.is_input_T) - 1)[token_M]


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
