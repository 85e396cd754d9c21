"""Cuts a prepared data set into days (UTC), and makes of them the data set of each day's model.

The model of day d trains on rows up to day d and is scored on later ones. A value that no row up to d shows is unknown
(index 1) in the rows that it is scored on, as in a build of that day; so is one that the vocabulary never had. Means,
deviations and bounds of numbers stay those of the whole data set. Shape letters: B rows, T tokens of their histories.
"""

import collections
import collections.abc
import dataclasses
import datetime
import os
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist import schema

DAY_S = 86_400
MAX_DAYS = 60  # that are scored: each takes two trainings (untuned)
_ROW_GROUP_ROWS = 4096  # as a build writes by default
_SEEN, _PRETRAIN, _READY = "first_seen.npz", "pretrain", "ready"
_NEVER, _ALWAYS = np.iinfo(np.int32).max, np.iinfo(np.int32).min


def name_of(day: int) -> str:
    """Writes a day (counted from 1970) as a date, 2022-04-25."""
    return str(datetime.date(1970, 1, 1) + datetime.timedelta(day))


@dataclasses.dataclass(frozen=True)
class Days:
    """Holds the rows of a data set by day, in `folder`; what lies before the first model's day is one file."""

    manifest: schema.Manifest
    folder: pathlib.Path
    models: tuple[int, ...]
    """Days that a model is trained up to, each of them followed by a scored one."""
    scored: tuple[int, ...]

    @property
    def first(self) -> int:
        """Day of the first model."""
        return self.models[0]

    @property
    def _with_names(self) -> list[schema.Table]:
        """Lists the tables that have a vocabulary."""
        return [table for table in self.manifest.tables if table.name not in self.manifest.unbounded]

    def data_set(
        self,
        folder: pathlib.Path,
        train: collections.abc.Sequence[int],
        valid: collections.abc.Sequence[int] = (),
        scored: collections.abc.Sequence[int] = (),
        *,
        known: int,
    ) -> pathlib.Path:
        """Makes the data set with rows of these days as `train`, `valid` and `test`, unless it is there. Returns it.

        Values that no row up to day `known` shows are unknown in `valid` and `test`.
        """
        if (folder / schema.MANIFEST_NAME).is_file():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        seen = np.load(self.folder / _SEEN)
        known_V = {table.name: seen[f"arr_{n}"] <= known for n, table in enumerate(self._with_names)}
        made = []
        for name, days in ((_PRETRAIN, [None]), ("train", train), ("valid", valid), ("test", scored)):
            files, parts = [], []
            for day in days:
                path = self.file(day)
                if not path.is_file():
                    continue  # no pretraining, or no row on that day
                here = folder / f"{name}-{path.name}"
                here.unlink(missing_ok=True)
                if name in (_PRETRAIN, "train"):
                    _link(path, here)
                else:
                    pq.write_table(_masked(pq.read_table(path), self.manifest, known_V), here, _ROW_GROUP_ROWS)
                files.append(here.name)
                parts.append(_counts(self.manifest, here, name != _PRETRAIN))
            if files or name != _PRETRAIN:
                made.append(_split(name, files, parts))
        schema.write_manifest(dataclasses.replace(self.manifest, splits=tuple(made)), folder)
        return folder

    def write(self, data_dir: pathlib.Path) -> None:
        """Writes the rows of each day, and the histories up to the first model's day, unless they are there."""
        if (self.folder / _READY).is_file():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        seen = {table.name: np.full(table.num_rows, _NEVER, np.int32) for table in self._with_names}
        _write_days(data_dir, self, seen)
        _write_pretraining(data_dir, self, seen)
        np.savez_compressed(self.folder / _SEEN, *seen.values())
        (self.folder / _READY).touch()

    def lines(self) -> collections.abc.Iterator[str]:
        """Says what is trained and scored, and where days are missing."""
        known, all_days = [*self.models, self.scored[-1]], range(self.first, self.scored[-1] + 1)
        yield f"models of {len(self.models)} days, {name_of(self.first)} to {name_of(self.models[-1])} (UTC)"
        missing = [name_of(day) for day in all_days if day not in known]
        if missing:
            shown = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
            yield f"note: {len(missing)} days in between have no request ({shown}): the model of before serves the next"

    def file(self, day: int | None) -> pathlib.Path:
        """Names the file of a day's rows; None: of the pretraining histories."""
        return self.folder / f"{_PRETRAIN if day is None else name_of(max(day, self.models[0] - 1))}.parquet"


def find(data_dir: pathlib.Path, manifest: schema.Manifest, folder: pathlib.Path, num_scored: int | None) -> Days:
    """Finds the days of all requests; the last `num_scored` are scored (None: the later half). Writes nothing.

    ValueError, in the words of whoever has a log, where there are no days to be had.
    """
    labels = _labels(data_dir, manifest)
    dates = sorted(labels)
    if len(dates) < 3:
        raise ValueError(
            f"{data_dir} has requests of {len(dates)} day{'s' * (len(dates) > 1)} ({', '.join(map(name_of, dates))}, "
            "UTC): one day to train on, one to choose the length of a training by and one to score are needed. Build "
            "it from a longer log; for one cut without days leave out --daily"
        )
    # In the later half the log no more than doubles, so that a number of epochs chosen at its beginning fits it all.
    num_scored = len(dates) // 2 if num_scored is None else num_scored
    if num_scored > min(len(dates) - 2, MAX_DAYS):
        raise ValueError(
            f"{data_dir} has requests of {len(dates):,} days, {name_of(dates[0])} to {name_of(dates[-1])} (UTC), and "
            f"{num_scored:,} of them would be scored, each by models of its own: say how many of the last ones, at "
            f"most {min(len(dates) - 2, MAX_DAYS)}, for instance --days {min(len(dates) - 2, 14)}"
        )
    days = Days(manifest, folder, tuple(dates[-num_scored - 1 : -1]), tuple(dates[-num_scored:]))
    before = sum((labels[day] for day in dates if day < days.first), np.zeros(2, np.int64))
    for which, (negatives, positives) in (("before", before), ("of", labels[days.first])):
        if not (negatives and positives):
            raise ValueError(
                f"the requests {which} {name_of(days.first)} (UTC), which the first model is made of, have "
                f"{positives:,} of {positives + negatives:,} candidates with {manifest.tasks[0].name} = 1: with one "
                f"class alone nothing can be learnt. Begin later (--days {max(num_scored - 1, 1)} scores fewer "
                "days), or take a log with both classes"
            )
    return days


def _labels(data_dir: pathlib.Path, manifest: schema.Manifest) -> dict[int, np.ndarray]:
    """Counts negatives and positives of the first task on each day that has a request."""
    label = f"label.{manifest.tasks[0].name}"
    found: dict[int, np.ndarray] = collections.defaultdict(lambda: np.zeros(2, np.int64))
    for table in filter(len, _batches(data_dir, manifest, ["request_time_s", label])):  # a split may have no row
        time_s_B, label_BK = (table[name].combine_chunks() for name in ("request_time_s", label))
        earliest_s = pc.min(time_s_B).as_py()
        if time_s_B.null_count or earliest_s is None or earliest_s <= 0:
            raise ValueError(
                f"{data_dir} has requests without a time: which day they are of cannot be said. Name the column with "
                "the time in the schema of the log (`time`), and build it again; without times leave out --daily"
            )
        row_N, label_N = pc.list_parent_indices(label_BK).to_numpy(), pc.list_flatten(label_BK).to_numpy(False)
        day_B = time_s_B.to_numpy() // DAY_S
        for day in np.unique(day_B):
            is_of_day_N = day_B[row_N] == day
            found[int(day)] += [int((label_N[is_of_day_N] == value).sum()) for value in (0, 1)]
    return found


def check_days_are_whole(data_dir: pathlib.Path, manifest: schema.Manifest) -> None:
    """Raises ValueError if a request may hold candidates of the day after: training would see what is scored."""
    is_cut = manifest.options.get("daily_requests") or manifest.options.get("split_rule") != "TimeBoundaries"
    splits = [split for split in manifest.splits if split.time_from_s is not None]
    if not is_cut and any(split.num_candidates > split.num_rows for split in splits):
        raise ValueError(
            f"{data_dir} has requests that reach over midnight: candidates that a user was shown one after the other "
            "share a request, which has the time of the first, so a day would be trained on labels of the next one. "
            "Build it again with --daily_requests: python -m data_pipeline.build ... --daily_requests"
        )


def check_can_pretrain(data_dir: pathlib.Path, manifest: schema.Manifest, days: Days) -> None:
    """Raises ValueError if no history has two events before the first model's day."""
    for file in manifest.split(_PRETRAIN).files:
        with pq.ParquetFile(data_dir / file) as parquet:
            columns = ["history_length", "history.time_s"]
            groups = (parquet.read_row_group(group, columns) for group in range(parquet.num_row_groups))
            if any(len(_cut_histories(rows, days.first * DAY_S)) for rows in groups):
                return
    raise ValueError(
        f"no history in {data_dir} has two events before {name_of(days.first)} (UTC), the day of the first model, so "
        f"there is nothing to pretrain on: begin later (--days {max(len(days.scored) - 1, 1)} scores fewer days), take "
        "a longer log, or leave the pretraining out: --strategies NT"
    )


def _batches(
    data_dir: pathlib.Path, manifest: schema.Manifest, columns: list[str] | None = None
) -> collections.abc.Iterator[pa.Table]:
    """Yields all rows with a request, a row group at a time."""
    for split in manifest.splits:
        for file in split.files if split.name != _PRETRAIN else ():
            with pq.ParquetFile(data_dir / file) as parquet:
                for group in range(parquet.num_row_groups):
                    yield parquet.read_row_group(group, columns)


def _write_days(data_dir: pathlib.Path, days: Days, seen: dict[str, np.ndarray]) -> None:
    waiting: dict[pathlib.Path, list[pa.Table]] = collections.defaultdict(list)
    writers: dict[pathlib.Path, pq.ParquetWriter] = {}

    def flush(path: pathlib.Path) -> None:
        table = pa.concat_tables(waiting.pop(path))
        if path not in writers:
            writers[path] = pq.ParquetWriter(path, table.schema, compression="zstd")
        writers[path].write_table(table, _ROW_GROUP_ROWS)

    for table in _batches(data_dir, days.manifest):
        day_B = table["request_time_s"].to_numpy() // DAY_S
        for day in np.unique(day_B):
            rows = table.filter(pa.array(day_B == day))
            _note_seen(rows, days.manifest, int(day), seen)
            waiting[days.file(int(day))].append(rows)
        for path in [path for path, parts in waiting.items() if sum(map(len, parts)) >= _ROW_GROUP_ROWS]:
            flush(path)
    for path in list(waiting):
        flush(path)
    for writer in writers.values():
        writer.close()


def _write_pretraining(data_dir: pathlib.Path, days: Days, seen: dict[str, np.ndarray]) -> None:
    """Writes the histories as they were when the first model's day began; events without a time are older."""
    writer = None
    names = {split.name: split for split in days.manifest.splits}
    for file in names[_PRETRAIN].files if _PRETRAIN in names else ():
        table = _cut_histories(pq.read_table(data_dir / file), days.first * DAY_S)
        if len(table):
            _note_seen(table, days.manifest, _ALWAYS, seen)
            writer = writer or pq.ParquetWriter(days.file(None), table.schema, compression="zstd")
            writer.write_table(table, _ROW_GROUP_ROWS)
    if writer is not None:
        writer.close()


def _cut_histories(table: pa.Table, until_s: int) -> pa.Table:
    """Leaves out the events from `until_s` on, and rows with less than the two events that pretraining needs."""
    table = table.combine_chunks()
    time_s = table["history.time_s"].combine_chunks()
    row_T = pc.list_parent_indices(time_s).to_numpy()
    is_kept_T = pc.fill_null(pc.less(pc.list_flatten(time_s), until_s), True).to_numpy(zero_copy_only=False)
    length_B = np.bincount(row_T[is_kept_T], minlength=len(table))
    offsets = pa.array(np.concatenate([[0], np.cumsum(length_B)]), pa.int32())
    for number, field in enumerate(table.schema):
        if field.name.startswith("history."):
            values = pc.list_flatten(table[field.name].combine_chunks()).filter(pa.array(is_kept_T))
            table = table.set_column(number, field, pa.ListArray.from_arrays(offsets, values).cast(field.type))
    number = table.schema.get_field_index("history_length")
    table = table.set_column(number, table.schema.field(number), pa.array(length_B, pa.int32()))
    return table.filter(pa.array(length_B >= 2))


def _columns(manifest: schema.Manifest) -> collections.abc.Iterator[tuple[str, str]]:
    """Yields column and table of every feature with a vocabulary."""
    for feature in manifest.features:
        if feature.table is not None and feature.table not in manifest.unbounded:
            yield from ((f"{place}.{feature.name}", feature.table) for place in feature.places)


def _note_seen(rows: pa.Table, manifest: schema.Manifest, day: int, seen: dict[str, np.ndarray]) -> None:
    for column, table in _columns(manifest):
        if column in rows.column_names:
            values = rows[column].combine_chunks()
            while pa.types.is_list(values.type):
                values = pc.list_flatten(values)
            index = pc.unique(values).drop_null().to_numpy(zero_copy_only=False)
            seen[table][index] = np.minimum(seen[table][index], day)


def _masked(rows: pa.Table, manifest: schema.Manifest, known: dict[str, np.ndarray]) -> pa.Table:
    """Makes every value unknown that is not known."""
    rows = rows.combine_chunks()
    for column, table in _columns(manifest):
        field = rows.schema.field(column)
        values = _mask(rows[column].combine_chunks(), known[table])
        rows = rows.set_column(rows.schema.get_field_index(column), field, values.cast(field.type))
    return rows


def _mask(values: pa.Array, known_V: np.ndarray) -> pa.Array:
    if pa.types.is_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, _mask(pc.list_flatten(values), known_V))
    index = values.to_numpy(zero_copy_only=False)
    return pa.array(np.where(known_V[index], index, schema.UNKNOWN_INDEX), pa.int64())


def _counts(manifest: schema.Manifest, path: pathlib.Path, has_requests: bool) -> tuple[int, int, int, list[int]]:
    """Counts rows, events and candidates of a file, and finds its first and last time."""
    names = ["request_time_s", f"candidate.{manifest.item_feature}"] if has_requests else []
    table = pq.read_table(path, columns=["history_length", *names])
    events = pc.sum(table["history_length"]).as_py() or 0
    if not has_requests:
        return len(table), events, 0, []
    times = pc.min_max(table["request_time_s"]).as_py()
    candidates = pc.sum(pc.list_value_length(table[names[1]])).as_py()
    return len(table), events, candidates, [times["min"], times["max"]]


def _split(name: str, files: list[str], parts: list[tuple[int, int, int, list[int]]]) -> schema.Split:
    times = [time for part in parts for time in part[3]]
    return schema.Split(
        name,
        tuple(files),
        num_rows=sum(part[0] for part in parts),
        num_history_tokens=sum(part[1] for part in parts),
        num_candidates=sum(part[2] for part in parts),
        time_from_s=min(times, default=None),
        time_to_s=max(times, default=None),
    )


def _link(path: pathlib.Path, here: pathlib.Path) -> None:
    try:
        os.link(path, here)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, here)
