"""Computes the features of the boosted trees from any prepared data set, without knowing its columns by name.

Labels enter in one way only: as the rate of an index (or of the user) over rows whose request is strictly earlier than
that of the row described. So the features of a row contain neither its own label nor one of the same request.

Shape letters: B requests of one Parquet batch, N candidates, M elements of all candidates (N, or more in a bag),
H elements of all histories, V rows of a table.
"""

import dataclasses
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import logit

from gpsd_dist import schema
from gpsd_dist.baselines import rows
from gpsd_dist.data.split_batches import pretrain_counts, read_batches

MAX_CATEGORIES = 128  # a larger vocabulary is described by label rates and counts; LightGBM's bins end at 255. Untuned
PSEUDO_COUNTS = 20.0  # weight of the overall rate in each index's rate, as in the rates baseline; untuned


@dataclasses.dataclass(frozen=True)
class Elements:
    """Holds the indices of every candidate: one, or any number in a bag."""

    value_M: np.ndarray  # int64, candidate after candidate
    length_N: np.ndarray  # int64, elements of each candidate

    def candidate_M(self) -> np.ndarray:
        """Returns the candidate that each element belongs to."""
        return np.repeat(np.arange(len(self.length_N)), self.length_N)

    def select(self, is_used_N: np.ndarray) -> "Elements":
        return Elements(self.value_M[np.repeat(is_used_N, self.length_N)], self.length_N[is_used_N])

    def reduce(self, ufunc: np.ufunc, value_M: np.ndarray) -> np.ndarray:
        """Reduces the elements of each candidate by `ufunc` (add, minimum, maximum); NaN where there are none."""
        result_N = np.full(len(self.length_N), np.nan)
        is_filled_N = self.length_N > 0
        if is_filled_N.any():
            start_N = np.cumsum(self.length_N) - self.length_N
            result_N[is_filled_N] = ufunc.reduceat(value_M, start_N[is_filled_N])
        return result_N

    def mean(self, value_M: np.ndarray) -> np.ndarray:
        return self.reduce(np.add, value_M) / np.maximum(self.length_N, 1)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Holds candidates of a split that count for a task, with all features but label rates."""

    label_N: np.ndarray  # uint8, 0 or 1
    user_hash_N: np.ndarray  # int64
    time_s_N: np.ndarray  # int64, of the request
    item_N: np.ndarray  # int64, table index
    sampling: rows.Sampling
    columns: dict[str, np.ndarray]  # feature -> float32 [N]; NaN for missing
    keys: dict[str, Elements]  # get a label rate: the user, features of a large vocabulary, bags
    categories: frozenset[str]  # those of `columns` that hold an index

    def rows(self) -> rows.Rows:
        """Returns who and what is scored, without features."""
        history_N = self.columns["history:length"]
        return rows.Rows(self.label_N, self.user_hash_N, self.time_s_N, self.item_N, self.sampling, {}, history_N)

    def select(self, is_used_N: np.ndarray) -> "Examples":
        return dataclasses.replace(
            self,
            label_N=self.label_N[is_used_N],
            user_hash_N=self.user_hash_N[is_used_N],
            time_s_N=self.time_s_N[is_used_N],
            item_N=self.item_N[is_used_N],
            sampling=self.sampling.select(is_used_N),
            columns={name: column_N[is_used_N] for name, column_N in self.columns.items()},
            keys={name: elements.select(is_used_N) for name, elements in self.keys.items()},
        )


def read_examples(data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, task: str) -> Examples:
    """Reads every candidate of a split that counts for the task, in file order; all columns must fit into memory.

    ValueError if the split, the task or a column is not there, or no candidate counts.
    """
    shared = _shared(manifest)
    popularity = {feature.name: pretrain_counts(data_dir, manifest, feature) for feature in shared}
    places = [(place, feature) for place in ("candidate", "context") for feature in manifest.features_in(place)]
    columns = [f"{place}.{feature.name}" for place, feature in places]
    columns += ["request_time_s", *(f"history.{feature.name}" for feature in shared)]
    parts = []
    for batch in read_batches(data_dir, manifest, split, rows.task_columns(manifest, task, columns)):
        label_N, is_used_N = rows.used_candidates(batch, manifest, task)
        made = _Batch(batch, manifest, rows.candidates_per_row(batch, task))
        for place, feature in places:
            made.add_feature(place, feature)
        for feature in shared:
            made.add_matches(feature, manifest.table(feature.table).num_rows)
            made.add_popularity(feature, popularity[feature.name])
        sampling = rows.sampling_of(batch, manifest, task, label_N)
        parts.append(made.examples(label_N, sampling).select(is_used_N))
    if not sum(len(part.label_N) for part in parts):
        raise ValueError(f"split {split!r} of {data_dir} has no candidate with an observed label of task {task!r}")
    return concatenated(parts)


def _shared(manifest: schema.Manifest) -> list[schema.Feature]:
    """Lists categorical features that candidates and history tokens have."""
    return [f for f in manifest.features_in("candidate") if "history" in f.places and f.table is not None]


def concatenated(parts: list[Examples]) -> Examples:
    """Concatenates examples in order."""
    columns, keys = parts[0].columns, parts[0].keys
    return Examples(
        np.concatenate([part.label_N for part in parts]),
        np.concatenate([part.user_hash_N for part in parts]),
        np.concatenate([part.time_s_N for part in parts]),
        np.concatenate([part.item_N for part in parts]),
        rows.Sampling.concatenated([part.sampling for part in parts]),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in columns},
        {
            name: Elements(
                np.concatenate([part.keys[name].value_M for part in parts]),
                np.concatenate([part.keys[name].length_N for part in parts]),
            )
            for name in keys
        },
        parts[0].categories,
    )


class _Batch:
    """Collects columns of the candidates of one Parquet batch."""

    def __init__(self, batch: pa.RecordBatch, manifest: schema.Manifest, num_candidates_B: np.ndarray):
        self.batch, self.manifest, self.num_candidates_B = batch, manifest, num_candidates_B
        self.row_N = np.repeat(np.arange(len(batch)), num_candidates_B)
        self.columns: dict[str, np.ndarray] = {}
        self.keys: dict[str, Elements] = {}
        self.categories: set[str] = set()
        history = batch[f"history.{manifest.item_feature}"]
        self.history_length_B = pc.list_value_length(history).to_numpy(zero_copy_only=False).astype(np.int64)
        self.columns["history:length"] = self.history_length_B[self.row_N]

    def add_feature(self, place: str, feature: schema.Feature) -> None:
        """Adds a number as it is, a small vocabulary as a category, anything else as a key that gets a label rate."""
        name = f"{place}.{feature.name}"
        elements = self._elements(place, feature)
        if feature.table is None:
            self.columns[name] = elements.value_M
        elif self.manifest.table(feature.table).num_rows <= MAX_CATEGORIES and not feature.is_bag:
            self.columns[name] = elements.value_M
            self.categories.add(name)
        else:
            self.keys[name] = elements
        if feature.is_bag:
            self.columns[f"{name}:size"] = elements.length_N

    def add_matches(self, feature: schema.Feature, num_table_rows: int) -> None:
        """Counts how often the candidate's index is in the history, its share of the tokens, and its age in tokens.

        Age 1 is the latest token, NaN never. A bag takes the best of its elements. Unknown never matches.
        """
        value_H, row_H, age_H = self._history(feature)
        code_H = row_H * num_table_rows + value_H
        # Latest first, because np.unique returns the first place of each code.
        known_H = (value_H >= schema.NUM_RESERVED_ROWS)[::-1]
        code_K, first_K, count_K = np.unique(code_H[::-1][known_H], return_index=True, return_counts=True)
        age_K = age_H[::-1][known_H][first_K]
        elements = self._elements("candidate", feature)
        code_M = self.row_N[elements.candidate_M()] * num_table_rows + elements.value_M
        place_M, is_found_M = _find(code_K, code_M)
        count_N = elements.reduce(np.maximum, np.where(is_found_M, np.append(count_K, 0)[place_M], 0.0))
        age_N = elements.reduce(np.minimum, np.where(is_found_M, np.append(age_K, 0)[place_M], np.inf))
        name = f"{feature.name}:history"
        self.columns[f"{name}_matches"] = count_N
        self.columns[f"{name}_share"] = count_N / np.maximum(self.history_length_B[self.row_N], 1)
        self.columns[f"{name}_age"] = np.where(np.isinf(age_N), np.nan, age_N)

    def add_popularity(self, feature: schema.Feature, counts_V: np.ndarray) -> None:
        """Adds log(1 + events of the index in the pretraining histories); the mean over a bag."""
        elements = self._elements("candidate", feature)
        self.columns[f"{feature.name}:log_popularity"] = elements.mean(np.log1p(counts_V)[elements.value_M])

    def examples(self, label_N: np.ndarray, sampling: rows.Sampling) -> Examples:
        """Returns all candidates, used or not; a label that was not observed is 0."""
        user_hash_N = self.batch["user_hash"].to_numpy(zero_copy_only=False)[self.row_N]
        item = f"candidate.{self.manifest.item_feature}"
        return Examples(
            (label_N == 1).astype(np.uint8),
            user_hash_N,
            self.batch["request_time_s"].to_numpy(zero_copy_only=False)[self.row_N],
            rows.per_candidate(self.batch[item], item, self.num_candidates_B),
            sampling,
            {name: column_N.astype(np.float32) for name, column_N in self.columns.items()},
            {rows.USER_KEY: Elements(user_hash_N, np.ones(len(user_hash_N), np.int64))} | self.keys,
            frozenset(self.categories),
        )

    def _elements(self, place: str, feature: schema.Feature) -> Elements:
        column = self.batch[f"{place}.{feature.name}"]
        return Elements(*rows.elements_per_candidate(column, feature, place, self.num_candidates_B))

    def _history(self, feature: schema.Feature) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns value, row and age (1: latest token) of every element of the histories, oldest token first."""
        length_B = self.history_length_B
        row_T = np.repeat(np.arange(len(length_B)), length_B)
        age_T = np.cumsum(length_B)[row_T] - np.arange(len(row_T))
        tokens = pc.list_flatten(self.batch[f"history.{feature.name}"])
        if not feature.is_bag:
            return tokens.to_numpy(zero_copy_only=False), row_T, age_T
        size_T = pc.list_value_length(tokens).to_numpy(zero_copy_only=False)
        value_H = pc.list_flatten(tokens).to_numpy(zero_copy_only=False)
        return value_H, np.repeat(row_T, size_T), np.repeat(age_T, size_T)


def matrix(examples: Examples, counted: Examples) -> tuple[np.ndarray, list[str]]:
    """Computes the features of `examples`, float32 [N, F], and their names.

    Label rates count the rows of `counted` that are strictly earlier than the row described; both may be the same.
    """
    columns = dict(examples.columns)
    prior_N = _earlier_rate(examples, counted)
    for name, elements in examples.keys.items():
        rows_M, positives_M = _earlier(examples, elements, counted, counted.keys[name])
        prior_M = prior_N[elements.candidate_M()]
        rate_M = (positives_M + PSEUDO_COUNTS * prior_M) / (rows_M + PSEUDO_COUNTS)
        columns[f"{name}:log_odds"] = elements.mean(logit(rate_M) - logit(prior_M))
        columns[f"{name}:log_count"] = elements.mean(np.log1p(rows_M))
    names = list(columns)
    return np.column_stack([columns[name] for name in names]).astype(np.float32), names


def _earlier(
    examples: Examples, elements: Elements, counted: Examples, counted_elements: Elements
) -> tuple[np.ndarray, np.ndarray]:
    """Counts rows and positives of `counted` with an element's value and a strictly earlier request, both [M]."""
    time_T = np.unique(counted.time_s_N)
    value_K, index_C = np.unique(counted_elements.value_M, return_inverse=True)
    from_C = counted_elements.candidate_M()
    width = len(time_T) + 1
    code_C = index_C * width + np.searchsorted(time_T, counted.time_s_N)[from_C]
    order_C = np.argsort(code_C, kind="stable")
    code_C, positives_C = code_C[order_C], np.append(0, np.cumsum(counted.label_N[from_C][order_C], dtype=np.int64))
    place_M, is_found_M = _find(value_K, elements.value_M)
    first_M = np.searchsorted(code_C, place_M * width)
    end_M = np.searchsorted(
        code_C, place_M * width + np.searchsorted(time_T, examples.time_s_N)[elements.candidate_M()]
    )
    return np.where(is_found_M, end_M - first_M, 0), np.where(is_found_M, positives_C[end_M] - positives_C[first_M], 0)


def _earlier_rate(examples: Examples, counted: Examples) -> np.ndarray:
    """Computes the share of positives among strictly earlier rows of `counted`, smoothed towards one half, [N]."""
    lengths = (len(examples.label_N), len(counted.label_N))
    here, there = (Elements(np.zeros(length, np.int64), np.ones(length, np.int64)) for length in lengths)
    rows_N, positives_N = _earlier(examples, here, counted, there)
    return (positives_N + 0.5 * PSEUDO_COUNTS) / (rows_N + PSEUDO_COUNTS)


def _find(known_K: np.ndarray, value_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds each value among the sorted distinct known ones; returns its place (or K) and whether it is known."""
    place_M = np.searchsorted(known_K, value_M)
    is_found_M = np.append(known_K, 0)[place_M] == value_M
    return place_M, is_found_M & (place_M < len(known_K))
