"""Reads columns of Arrow tables into numpy arrays, and checks every value against the data contract of `schema.py`.

Works on whole columns, never row by row. Shape letters: B requests, T history tokens, C candidates.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpsd_dist.batch.packing import cuts
from gpsd_dist.batch.row_layout import ranges
from gpsd_dist.data.gather import one_chunk
from gpsd_dist.data.hashing import hashed_rows
from gpsd_dist.data.parquet_dataset import BadValue
from gpsd_dist.features import Values, standardise
from gpsd_dist.schema import Feature, Manifest


@dataclasses.dataclass(frozen=True)
class ColumnReader:
    """Reads the columns of some rows. BadValue names the column and the row of the first value that is wrong."""

    manifest: Manifest
    rows: pa.Table
    order: np.ndarray
    """int64 [B]: place of each row in the batch as it was read, before requests were sorted; for error messages."""

    def lengths(self, name: str) -> np.ndarray:
        """Returns the number of entries in each row's list: int64 [B]."""
        return np.diff(_offsets_of(one_chunk(self.rows[name])))

    def last_entries(self, name: str, keep: np.ndarray) -> np.ndarray | None:
        """Returns the positions of the last `keep[i]` entries of row i's list, for all rows; None if nothing is cut."""
        offsets = _offsets_of(one_chunk(self.rows[name]))
        return None if np.array_equal(np.diff(offsets), keep) else ranges(offsets[1:] - keep, keep)

    def jagged(
        self, name: str, feature: Feature, kept: np.ndarray | None = None, lengths: np.ndarray | None = None
    ) -> Values:
        """Reads a list column: the entries at `kept` (None: all), as table indices or standardised numbers.

        Each row must hold `lengths` entries (None: its `history_length`).
        """
        column = one_chunk(self.rows[name])
        offsets = _offsets_of(column)
        self._check_lengths(name, offsets, self.integers("history_length") if lengths is None else lengths)
        values = column.flatten()  # unlike `column.values`, only those of these rows if the array is a slice
        if feature.is_bag:
            ends = _offsets_of(values)
            array = self._checked(name, feature, values.flatten(), ends[offsets])
            if kept is None:
                return array, ends
            sizes = np.diff(ends)[kept]
            return array[ranges(ends[:-1][kept], sizes)], cuts(sizes)
        array = self._checked(name, feature, values, offsets)
        return _as_index(array if kept is None else array[kept])

    def flat(self, name: str, feature: Feature) -> Values:
        """Reads a context column: one value, or one bag, per request."""
        values = one_chunk(self.rows[name])
        if not feature.is_bag:
            return self._checked(name, feature, values, np.arange(len(values) + 1))
        offsets = _offsets_of(values)
        return _as_index(self._checked(name, feature, values.flatten(), offsets)), offsets

    def history_time_s(self, kept: np.ndarray | None) -> np.ndarray:
        """Reads the times of the history tokens at `kept` (None: all): int64 [T], -1 where null."""
        column = one_chunk(self.rows["history.time_s"])
        self._check_lengths("history.time_s", _offsets_of(column), self.integers("history_length"))
        values = column.flatten()
        array = (pc.fill_null(values, -1) if values.null_count else values).to_numpy()
        return _as_index(array if kept is None else array[kept])

    def integers(self, name: str) -> np.ndarray:
        """Reads a column with one integer per request: int64 [B]. A null is an error."""
        values = one_chunk(self.rows[name])
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise BadValue(name, int(self.order[row]), "is null, expected an integer")
        return values.to_numpy()

    def labels(self, name: str, candidate_counts: np.ndarray) -> np.ndarray:
        """Reads the labels of a task: float32 [C], NaN where null. Anything but 0, 1 and null is an error."""
        labels, offsets = self._of_candidates(name, candidate_counts)
        values = labels.to_numpy(zero_copy_only=False).astype(np.float32)
        is_bad = ~((values == 0) | (values == 1) | labels.is_null().to_numpy(zero_copy_only=False))
        self._raise_if(is_bad, values, name, "a label must be 0, 1 or null (not observed)", offsets)
        return values

    def sampling(self, name: str, candidate_counts: np.ndarray) -> np.ndarray:
        """Reads a weight or a rate: float32 [C]. A null is an error, as are negative weights and a rate of 0."""
        column, offsets = self._of_candidates(name, candidate_counts)
        values = column.to_numpy(zero_copy_only=False).astype(np.float32)
        is_rate = name.endswith("_rate")
        is_good = (values > 0) & (values <= 1) if is_rate else (values >= 0) & np.isfinite(values)
        self._raise_if(~is_good, values, name, "above 0, at most 1" if is_rate else "a number of at least 0", offsets)
        return values

    def _of_candidates(self, name: str, candidate_counts: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        """Returns the flat values of a column with one entry per candidate, and their offsets into rows."""
        column = one_chunk(self.rows[name])
        offsets = _offsets_of(column)
        if not np.array_equal(np.diff(offsets), candidate_counts):
            row = int(np.flatnonzero(np.diff(offsets) != candidate_counts)[0])
            raise BadValue(name, int(self.order[row]), "has another number of entries than the row has candidates")
        return column.flatten(), offsets

    def _check_lengths(self, name: str, offsets: np.ndarray, expected: np.ndarray) -> None:
        wrong = np.flatnonzero(np.diff(offsets) != expected)
        if len(wrong):
            row = int(wrong[0])
            kind = name.split(".")[0]
            found = f"{offsets[row + 1] - offsets[row]} entries, expected {expected[row]}"
            raise BadValue(name, int(self.order[row]), f"{found} like the other {kind} columns of this row")

    def _checked(self, name: str, feature: Feature, values: pa.Array, offsets: np.ndarray) -> np.ndarray:
        array = values.to_numpy(zero_copy_only=False)
        if feature.kind == "numerical":
            self._raise_if(~np.isfinite(array), array, name, "a numerical feature must be finite and not null", offsets)
            return standardise(feature, array)
        limit = self.manifest.value_limit(feature.table)
        if values.null_count or (len(array) and not (array.min() >= 1 and array.max() < limit)):
            is_bad = np.isnan(array) if values.null_count else (array < 1) | (array >= limit)
            self._raise_if(is_bad, array, name, f"outside 1 .. {limit - 1} of table {feature.table!r}", offsets)
        if self.manifest.unbounded.get(feature.table) == "hashed":
            return hashed_rows(_as_index(array), self.manifest.table(feature.table).num_rows)
        return array

    def _raise_if(self, is_bad: np.ndarray, values: np.ndarray, name: str, rule: str, offsets: np.ndarray) -> None:
        """Raises BadValue for the first bad entry; `offsets` [B + 1] cut the entries into rows."""
        if is_bad.any():
            entry = int(np.flatnonzero(is_bad)[0])
            row = int(np.searchsorted(offsets, entry, side="right")) - 1
            raise BadValue(name, int(self.order[row]), f"value {values[entry]} is wrong: {rule}")


def _as_index(values: np.ndarray) -> np.ndarray:
    """Widens int32, in which the cache on disk has lists of integers that fit, to int64; leaves other types alone."""
    return values.astype(np.int64) if values.dtype == np.int32 else values


def _offsets_of(column: pa.ListArray) -> np.ndarray:
    """Returns the offsets into `column.flatten()`, which begins at the first row's first value: int64 [rows + 1]."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]
