"""Reads rows of prepared data as the tokens that serving makes of raw requests, with their labels.

Shape letters: B requests, C candidates.
"""

import collections.abc
import dataclasses

import numpy as np
import pyarrow as pa

from gpsd_dist.config import RunConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.loader import Loader
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.features import Values
from gpsd_dist.schema import Manifest
from gpsd_dist.serving.tokens import Tokens

Rows = collections.abc.Mapping[str, collections.abc.Callable[[np.ndarray], np.ndarray]]
"""Managed table -> function from ids to rows."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Holds the tokens of some rows, sorted by history length, with their labels, users and times."""

    tokens: Tokens
    labels: dict[str, np.ndarray]
    """Task -> float32 [C], NaN where not observed."""
    user_hash_C: np.ndarray
    request_time_s_C: np.ndarray


class TokenReader(Collate):
    """Reads rows by the code that training reads them by, up to the tokens."""

    def tokens(self, rows: pa.Table, managed: Rows) -> Labelled:
        """Reads rows with candidates. BadValue for a value that breaks the contract."""
        order, length = self._sort_by_length(rows)
        part = self._read(rows.take(pa.array(order)).combine_chunks(), order, length)
        columns = {
            place: {name: self._served(name, values, managed) for name, values in features.items()}
            for place, features in part.columns.items()
        }
        count_B, time_s_B = part.packing.candidate_count_B, part.scalars["request_time_s"]
        nothing_B = np.zeros(len(order), np.int64)  # of what only requests say
        made = Tokens(length, count_B, columns, part.history_time_s, time_s_B, nothing_B, nothing_B, {})
        per_candidate = (np.repeat(values, count_B) for values in (part.scalars["user_hash"], time_s_B))
        return Labelled(made, part.labels, *per_candidate)

    def _served(self, name: str, values: Values, managed: Rows) -> Values:
        """Gives rows for the ids of managed tables, as serving does."""
        table = self.manifest.feature(name).table
        if table not in managed:
            return values
        return (managed[table](values[0]), values[1]) if isinstance(values, tuple) else managed[table](values)


def read_split(
    run: RunConfig,
    manifest: Manifest,
    split: str,
    managed: Rows,
    *,
    rows_at_once: int = 256,
    shuffle: bool = False,
) -> collections.abc.Iterator[Labelled]:
    """Reads a split, in file order unless it is to be sampled."""
    reader = TokenReader(manifest, (), run.data.max_history_length, with_candidates=True)

    def make(rows: pa.Table, key: BatchKey) -> Labelled:
        return reader.tokens(rows, managed)

    yield from Loader(
        run.data_dir,
        manifest,
        split,
        make_batch=make,
        columns=reader.columns(),
        global_batch_rows=rows_at_once,
        shuffle=shuffle,
    )
