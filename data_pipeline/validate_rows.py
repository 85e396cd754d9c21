"""Checks the rows of one table for `validate`, without a Python loop over rows."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpsd_dist import schema


class Problems:
    """Keeps the first offender of each kind."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def add(self, kind: str, message: str) -> None:
        """Keeps the message if it is the first of its kind."""
        self._first.setdefault(kind, message)

    def raise_if_any(self, root: pathlib.Path) -> None:
        """Raises ValueError with one line per kind, if there is any."""
        if self._first:
            lines = "".join(f"\n  {message}" for message in self._first.values())
            raise ValueError(f"{root} breaks the data contract ({len(self._first)} kinds of problems):{lines}")


class RowChecker:
    """Checks invariants that hold inside one row."""

    def __init__(self, manifest: schema.Manifest, problems: Problems, has_exact_times: bool):
        """Sets the rule for times.

        `has_exact_times`: history is earlier than the request in whole seconds, not only in the order of ties.
        """
        self.manifest, self.problems, self.has_exact_times = manifest, problems, has_exact_times
        self.sizes = {table.name: manifest.value_limit(table.name) for table in manifest.tables}

    def check(self, path: pathlib.Path, table: pa.Table, first_row: int) -> None:
        """Checks one row group; `first_row` is its place in the file."""
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._path, self._first_row = path, first_row
        for name, column in columns.items():
            if column.null_count:
                self._report("null", name, column.is_null(), "nothing", "a value in every row")
                return
        self._check_lengths(columns)
        for feature in self.manifest.features:
            for place in feature.places:
                name = f"{place}.{feature.name}"
                if name in columns:
                    self._check_values(name, feature, place, columns[name])
        self._check_times(columns)
        for task in self.manifest.tasks:
            if f"label.{task.name}" in columns:
                self._check_labels(columns, task)
        for name in self.manifest.sampling:
            if f"sampling.{name}" in columns:
                self._check_sampling(f"sampling.{name}", columns[f"sampling.{name}"])

    def _report(self, kind: str, column: str, is_bad, found: str | np.ndarray, expected: str) -> None:
        """Adds the first row where `is_bad` (bool per row) is true."""
        is_bad = np.asarray(is_bad)
        if is_bad.any():
            row = int(np.argmax(is_bad))
            found = found if isinstance(found, str) else found[row]
            message = (
                f"{self._path}, column {column!r}, row {self._first_row + row}: found {found}, expected {expected}"
            )
            self.problems.add(f"{kind} {column}", message)

    def _report_value(
        self, kind: str, column: str, is_bad: np.ndarray, rows: np.ndarray, values: np.ndarray, expected: str
    ) -> None:
        """Adds the first bad value inside lists; `rows` gives the row of each value."""
        if is_bad.any():
            place = int(np.argmax(is_bad))
            at = f"{self._path}, column {column!r}, row {self._first_row + rows[place]}"
            message = f"{at}: found {values[place]}, expected {expected}"
            self.problems.add(f"{kind} {column}", message)

    def _check_lengths(self, columns: dict[str, pa.Array]) -> None:
        length = columns["history_length"].to_numpy()
        longest = self.manifest.max_history_length
        self._report("history", "history_length", (length < 0) | (length > longest), length, f"0 ... {longest}")
        is_pretrain = "request_time_s" not in columns
        if is_pretrain:
            self._report("history", "history_length", length < 2, length, "at least 2 events in a pretrain row")
        num_candidates = None if is_pretrain else _lengths(columns[f"candidate.{self.manifest.item_feature}"])
        for name, column in columns.items():
            if name.startswith("history."):
                found = _lengths(column)
                self._report("length", name, found != length, found, "as many elements as history_length")
            elif name.startswith(("candidate.", "label.", "sampling.")):
                found = _lengths(column)
                self._report("length", name, found != num_candidates, found, "as many elements as candidates")
        if num_candidates is not None:
            name = f"candidate.{self.manifest.item_feature}"
            self._report("length", name, num_candidates < 1, num_candidates, "at least one candidate")

    def _check_values(self, name: str, feature: schema.Feature, place: str, column: pa.Array) -> None:
        rows, values = np.arange(len(column)), column
        if place != "context":
            rows, values = _flatten(rows, values)
        if feature.is_bag:
            if values.null_count:
                self._report_value(
                    "null", name, np.asarray(values.is_null()), rows, np.full(len(values), "nothing"), "a bag"
                )
                return
            empty = _lengths(values) == 0
            self._report_value(
                "bag", name, empty, rows, np.full(len(values), "an empty bag"), "at least one index (1 = unknown)"
            )
            rows, values = _flatten(rows, values)
        if values.null_count:
            self._report_value(
                "null", name, np.asarray(values.is_null()), rows, np.full(len(values), "nothing"), "a value"
            )
            return
        numbers = values.to_numpy(zero_copy_only=False)
        if feature.kind == "numerical":
            self._report_value("number", name, ~np.isfinite(numbers), rows, numbers, "a finite number")
            return
        self._report_value(
            "padding", name, numbers == schema.PADDING_INDEX, rows, numbers, "no padding index inside a row"
        )
        size = self.sizes[feature.table]
        is_outside = (numbers < 0) | (numbers >= size)
        self._report_value(
            "index", name, is_outside, rows, numbers, f"an index 1 ... {size - 1} of table {feature.table!r}"
        )

    def _check_sampling(self, name: str, column: pa.Array) -> None:
        rows, values = _flatten(np.arange(len(column)), column)
        values = values.to_numpy(zero_copy_only=False)  # null becomes NaN
        is_rate = name.endswith("_rate")
        is_good = (values > 0) & (values <= 1) if is_rate else (values >= 0) & np.isfinite(values)
        self._report_value("sampling", name, ~is_good, rows, values, "above 0, at most 1" if is_rate else "at least 0")

    def _check_times(self, columns: dict[str, pa.Array]) -> None:
        name = "history.time_s"
        rows, times = _flatten(np.arange(len(columns[name])), columns[name])
        is_known = np.asarray(times.is_valid())
        rows, times = rows[is_known], times.drop_null().to_numpy()
        falls = np.zeros(len(times), bool)
        falls[1:] = (rows[1:] == rows[:-1]) & (times[1:] < times[:-1])
        self._report_value("ascending", name, falls, rows, times, "times that do not fall within a row")
        if "request_time_s" in columns:
            request = columns["request_time_s"].to_numpy()[rows]
            is_late = times >= request if self.has_exact_times else times > request
            earlier = "earlier than" if self.has_exact_times else "not later than"
            self._report_value("leak", name, is_late, rows, times, f"times {earlier} request_time_s")

    def _check_labels(self, columns: dict[str, pa.Array], task: schema.Task) -> None:
        name = f"label.{task.name}"
        rows, labels = _flatten(np.arange(len(columns[name])), columns[name])
        values = labels.to_numpy(zero_copy_only=False)  # null becomes NaN
        is_known = np.asarray(labels.is_valid())
        self._report_value(
            "label", name, is_known & (values != 0) & (values != 1), rows, values, "0, 1 or null (not observed)"
        )
        item = f"candidate.{self.manifest.item_feature}"
        item_rows, items = _flatten(np.arange(len(columns[item])), columns[item])
        if self.has_exact_times or len(items) != len(values) or items.null_count:
            # A log of exposures may show an item twice, clicked once. Drawn negatives must differ from the positive.
            return
        negative_rows, negatives = item_rows[values == 0], items.to_numpy()[values == 0]
        distinct, number = np.unique(items.to_numpy(), return_inverse=True)  # a row times an id of 60 bits overflows
        pair = item_rows * max(len(distinct), 1) + number
        clashes = np.isin(pair[values == 0], pair[values == 1]) & (negatives != schema.UNKNOWN_INDEX)
        self._report_value(
            "negative", item, clashes, negative_rows, negatives, "no negative that equals the row's positive"
        )


def _lengths(column: pa.Array) -> np.ndarray:
    return pc.list_value_length(column).to_numpy(zero_copy_only=False)


def _flatten(rows: np.ndarray, column: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Flattens a list column without null rows: (row of each element, elements)."""
    return rows[pc.list_parent_indices(column).to_numpy()], pc.list_flatten(column)
