"""Holds requests as the model reads them: table rows and standardised numbers.

Shape letters: B requests, T history tokens, C candidates, in the order of the caller.
"""

import collections
import dataclasses
import typing

import numpy as np

from gpsd_dist.features import Values


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Holds B requests. Rows are those of the tables as served: hashed and managed ids are rows already."""

    history_length_B: np.ndarray
    """int64"""
    candidate_count_B: np.ndarray
    """int64"""
    columns: dict[str, dict[str, Values]]
    """place -> feature -> int64 rows, float32 numbers, or a bag of rows, of T, C or B tokens."""
    history_time_s_T: np.ndarray
    """int64, -1 where unknown"""
    request_time_s_B: np.ndarray
    """int64"""
    unknown_ids_B: np.ndarray
    """Values of a request that read the unknown row of their table (int64); missing ones are among them."""
    dropped_events_B: np.ndarray
    """Events of a request that lie at or after its time, and are not read (int64)."""
    counts: dict[str, int]
    """Counts by reason over all requests together, such as "unknown item" or "events over the limit"."""

    def __len__(self) -> int:
        return len(self.history_length_B)

    @property
    def num_tokens(self) -> int:
        """Counts history tokens and candidates."""
        return int(self.history_length_B.sum() + self.candidate_count_B.sum())

    @staticmethod
    def concat(parts: typing.Sequence["Tokens"]) -> "Tokens":
        """Joins requests, part after part; at least one part. Counts add up."""
        if len(parts) == 1:
            return parts[0]
        arrays = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Tokens)
            if field.name not in ("columns", "counts")
        }
        columns = {
            place: {name: _joined([part.columns[place][name] for part in parts]) for name in features}
            for place, features in parts[0].columns.items()
        }
        counts: collections.Counter[str] = collections.Counter()
        for part in parts:
            counts.update(part.counts)
        return Tokens(**arrays, columns=columns, counts=dict(counts))


def _joined(parts: list[Values]) -> Values:
    if not isinstance(parts[0], tuple):
        return np.concatenate(typing.cast(list[np.ndarray], parts))
    values, offsets = zip(*parts, strict=True)
    starts = np.cumsum([0] + [cut[-1] for cut in offsets[:-1]])
    moved = [cut[1:] + start for cut, start in zip(offsets, starts, strict=True)]
    return np.concatenate(values), np.concatenate([np.zeros(1, np.int64), *moved])
