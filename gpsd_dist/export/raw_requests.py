"""Turns rows of prepared data back into raw requests, and chooses the examples that come with an artefact."""

import collections.abc
import itertools
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist.config import RunConfig
from gpsd_dist.data.loader import Loader
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.export.parquet_tokens import Labelled
from gpsd_dist.export.vocabularies import read_vocabulary
from gpsd_dist.schema import NUM_RESERVED_ROWS, Feature, Manifest
from gpsd_dist.serving.requests import RequestReader

NUM_EXAMPLES = 64
_UNKNOWN = "an id that no log has"
# Not null: a missing member of a bag is left out, an unknown one is the unknown row.
_RESERVED = [_UNKNOWN] * NUM_RESERVED_ROWS
_ROWS_READ = 2048
Request = dict[str, typing.Any]


class RawRequests:
    """Knows the raw id of every row of a vocabulary.

    Where a table has none (hashed and managed ids), the raw id is lost: text made of the number stands for it.
    """

    def __init__(self, data_dir: pathlib.Path, manifest: Manifest):
        self.manifest = manifest
        self._raw = {
            table.name: pa.concat_arrays([pa.array(_RESERVED), read_vocabulary(data_dir, table)])
            for table in manifest.tables
            if table.name not in manifest.unbounded
        }

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Converts rows to requests: the columns that they have with raw values, without labels."""
        facts = [name for name in ("user_id", "request_time_s", "history.time_s") if name in rows.column_names]
        columns = {name: rows[name].combine_chunks() for name in facts}
        for place in ("history", "candidate", "context"):
            for feature in self.manifest.features_in(place):
                if (name := f"{place}.{feature.name}") in rows.column_names:
                    columns[name] = self._raw_values(feature, rows[name].combine_chunks())
        return pa.table(columns)

    def _raw_values(self, feature: Feature, array: pa.Array) -> pa.Array:
        if pa.types.is_list(array.type):
            first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
            values = self._raw_values(feature, array.values[first:last])
            offsets = pa.array(array.offsets.to_numpy() - first, pa.int32())
            return pa.ListArray.from_arrays(offsets, values)
        if feature.table is None:
            return array
        if feature.table in self._raw:
            return self._raw[feature.table].take(array)
        numbers = array.to_pylist()
        return pa.array([f"id {n}" if n >= NUM_RESERVED_ROWS else _UNKNOWN for n in numbers], pa.string())


def read_requests(
    run: RunConfig, manifest: Manifest, split: str, reader: RequestReader, *, rows_at_once: int = 256
) -> collections.abc.Iterator[Labelled]:
    """Turns the rows of a split back into raw requests, and reads these by `reader`, that of another version.

    ValueError for tables that keep no raw ids.
    """
    if manifest.unbounded:
        raise ValueError(
            f"the current version has other features or tables than {run.data_dir}, whose tables "
            f"{sorted(manifest.unbounded)} keep no raw ids: they cannot be compared; leave out --replaces"
        )
    convert = RawRequests(pathlib.Path(run.data_dir), manifest)

    def make(rows: pa.Table, key: BatchKey) -> Labelled:
        requests = convert(rows)
        tokens = reader(requests.select([name for name in requests.column_names if name in reader.columns]))
        labels = {
            task.name: rows[f"label.{task.name}"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            for task in manifest.tasks
        }
        facts = (np.repeat(rows[name].to_numpy(), tokens.candidate_count_B) for name in ("user_hash", "request_time_s"))
        return Labelled(tokens, labels, *facts)

    yield from Loader(run.data_dir, manifest, split, make_batch=make, global_batch_rows=rows_at_once, shuffle=False)


def examples(
    data_dir: pathlib.Path, manifest: Manifest, max_history_length: int, max_candidates: int, splits=("valid", "train")
) -> list[Request]:
    """Chooses requests of the first of `splits` that has any, some changed to what is rare or wrong.

    A row of `pretrain` asks a second after its last event. ValueError if there are no rows.
    """
    filled = [split for name in splits for split in manifest.splits if split.name == name and split.num_rows]
    if not filled:
        raise ValueError(f"{data_dir} has no rows in {' or '.join(splits)}, so no example can come with the artefact")
    batch = next(pq.ParquetFile(data_dir / filled[0].files[0]).iter_batches(_ROWS_READ))
    take = np.unique(np.linspace(0, batch.num_rows - 1, NUM_EXAMPLES).astype(int))
    requests = RawRequests(data_dir, manifest)(pa.Table.from_batches([batch]).take(pa.array(take))).to_pylist()
    for request in requests:
        request.setdefault("request_time_s", 1 + max(filter(None, request["history.time_s"]), default=0))
    longest = max(requests, key=lambda request: len(request["history.time_s"]))
    changed = list(_changed(longest, manifest, max_history_length, max_candidates))
    return [*itertools.islice(requests, NUM_EXAMPLES - len(changed)), *changed]


def _changed(
    request: Request, manifest: Manifest, max_history_length: int, max_candidates: int
) -> collections.abc.Iterator[Request]:
    """Yields variants of a request that try one rule of reading each."""
    history = [name for name in request if name.startswith("history.")]
    candidate = [name for name in request if name.startswith("candidate.")]
    item, time_s = manifest.item_feature, request["request_time_s"]

    def resized(names: list[str], size: int) -> Request:
        return {name: list(itertools.islice(itertools.cycle(request[name] or [None]), size)) for name in names}

    yield request | {name: [] for name in history}
    for size in (1, max_history_length, 2 * max_history_length + 1):
        yield request | resized(history, size)
    for size in (1, max_candidates) if candidate else ():
        yield request | resized(candidate, size)
    full = request | resized(history, max(3, min(8, max_history_length)))
    num_events = len(full["history.time_s"])
    yield full | {"history.time_s": [None] * num_events}
    # Backwards, and the last event at the time of the request: it must be dropped.
    yield full | {"history.time_s": [time_s - 60 * i for i in range(num_events)]}
    yield full | {
        name: [_UNKNOWN] * len(full[name]) for name in (f"history.{item}", f"candidate.{item}") if name in full
    }
    for feature in (f for f in manifest.features if f.name != item):
        places = [place for place in feature.places if f"{place}.{feature.name}" in full]
        if places:
            yield full | {f"{p}.{feature.name}": _strange(feature, full[f"{p}.{feature.name}"], p) for p in places}


def _strange(feature: Feature, values: typing.Any, place: str) -> typing.Any:
    """Replaces values by unknown, missing and outlying ones, in turn."""
    odd: list[typing.Any] = [None, 1e30, -1e30] if feature.table is None else [None, _UNKNOWN]
    if feature.is_bag:
        odd = [[], [_UNKNOWN], [_UNKNOWN, _UNKNOWN, None]]
    return [odd[i % len(odd)] for i in range(len(values))] if place != "context" else odd[-1]
