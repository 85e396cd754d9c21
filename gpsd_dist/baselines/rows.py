"""Reads the candidates of one split that count for a task, with pyarrow and numpy, for every baseline.

Shape letters: B requests of one Parquet batch, N candidates, M elements of all candidates (N, or more in a bag).
"""

import collections.abc
import dataclasses
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpsd_dist import schema
from gpsd_dist.data.split_batches import read_batches
from gpsd_dist.metrics.classification import Predictions

USER_KEY = "user"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Holds the candidates of one split that count for a task."""

    label_N: np.ndarray  # uint8, 0 or 1
    user_hash_N: np.ndarray  # int64
    time_s_N: np.ndarray  # int64, of the request
    item_N: np.ndarray  # int64, table index
    sampling: "Sampling"
    keys: dict[str, np.ndarray]  # column name (or "user") -> int64 [N]
    history_N: np.ndarray | None = None  # events in the history of the request; None: not read


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Holds how often candidates count; None where the data set does not say, and each counts once."""

    weight_N: np.ndarray | None = None  # float64, sample weights
    inverse_rate_N: np.ndarray | None = None  # float64, rows of the whole log that one stands for

    def select(self, is_used_N: np.ndarray) -> "Sampling":
        return Sampling(*(None if part is None else part[is_used_N] for part in self._parts))

    def counts(self, is_weighted: bool = True) -> np.ndarray | None:
        """Multiplies sample weights (if `is_weighted`) and 1 / rate: float64 [N]; None where there is neither."""
        parts = [part for part in self._parts[not is_weighted :] if part is not None]
        return np.prod(parts, axis=0) if parts else None

    def fit_weights(self) -> np.ndarray | None:
        """Scales `counts` to a mean of 1 over the rows that count at all.

        So pseudo counts and penalties depend on the scale of weights as little as the loss of a model.
        """
        counts_N = self.counts()
        return counts_N if counts_N is None or not counts_N.any() else counts_N / counts_N[counts_N > 0].mean()

    @property
    def _parts(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        return self.weight_N, self.inverse_rate_N

    @staticmethod
    def concatenated(parts: "list[Sampling]") -> "Sampling":
        columns = zip(*(part._parts for part in parts))
        return Sampling(*(None if column[0] is None else np.concatenate(column) for column in columns))


def predictions(kind: str, score_N: np.ndarray, scored: Rows, is_weighted: bool = False) -> Predictions:
    """Makes Predictions with one score per candidate, which counts as often as that of a model would."""
    counts_N = scored.sampling.counts(is_weighted)
    made = Predictions(kind, with_items=True, with_weights=counts_N is not None)
    columns = scored.label_N, scored.user_hash_N, None, scored.time_s_N, scored.item_N, counts_N, scored.history_N
    made.add(score_N, *columns)
    return made


def read_rows(
    data_dir: str | os.PathLike, manifest: schema.Manifest, split: str, task_name: str, keys: tuple[str, ...]
) -> Rows:
    """Reads every candidate of a split that counts for the task, with the values of `keys`."""
    own = ["user_hash", "request_time_s", f"candidate.{manifest.item_feature}"]
    columns = list(dict.fromkeys([*own, *(key for key in keys if key != USER_KEY)]))
    parts, sampling = [], []
    for batch in read_batches(data_dir, manifest, split, task_columns(manifest, task_name, columns)):
        label_N, is_used_N = used_candidates(batch, manifest, task_name)
        num_candidates_B = candidates_per_row(batch, task_name)
        values = [per_candidate(batch[name], name, num_candidates_B) for name in columns]
        sampling.append(sampling_of(batch, manifest, task_name, label_N).select(is_used_N))
        parts.append([column[is_used_N] for column in (label_N, *values)])
    if not parts:
        raise ValueError(f"split {split!r} of {data_dir} has no rows")
    label_N, *values = (np.concatenate(column) for column in zip(*parts))
    user_hash_N, time_s_N, item_N = values[: len(own)]
    by_key = dict(zip(columns, values)) | {USER_KEY: user_hash_N}
    keyed = {key: by_key[key] for key in keys}
    return Rows(label_N.astype(np.uint8), user_hash_N, time_s_N, item_N, Sampling.concatenated(sampling), keyed)


def sampling_of(batch: pa.RecordBatch, manifest: schema.Manifest, task_name: str, label_N: np.ndarray) -> Sampling:
    """Reads how often the candidates of a batch count: a negative of a sampled log stands for 1 / rate rows.

    Conditional tasks do not see the rate: where their condition holds, no row was left out.
    """
    columns = {name: f"sampling.{name}" for name in manifest.sampling}
    if find_task(manifest, task_name).given:
        columns.pop("negative_rate", None)
    num_candidates_B = candidates_per_row(batch, task_name)
    found = {key: per_candidate(batch[name], name, num_candidates_B).astype(float) for key, name in columns.items()}
    rate_N = found.get("negative_rate")
    return Sampling(found.get("weight"), None if rate_N is None else np.where(label_N == 0, 1 / rate_N, 1.0))


def find_task(manifest: schema.Manifest, name: str) -> schema.Task:
    """Finds the task of that name; ValueError lists the known ones."""
    tasks = {task.name: task for task in manifest.tasks}
    if name not in tasks:
        raise ValueError(f"the data set has no task {name!r}; it has {list(tasks)}")
    return tasks[name]


def task_columns(manifest: schema.Manifest, task_name: str, others: collections.abc.Iterable[str] = ()) -> list[str]:
    """Lists the columns of a task (user, its label, that of its condition, weights) and `others`, each once."""
    task = find_task(manifest, task_name)
    given = [f"label.{task.given}"] if task.given else []
    sampling = [f"sampling.{name}" for name in manifest.sampling]
    return list(dict.fromkeys(["user_hash", f"label.{task_name}", *given, *sampling, *others]))


def candidates_per_row(batch: pa.RecordBatch, task_name: str) -> np.ndarray:
    """Counts the candidates of each request, int [B]."""
    return pc.list_value_length(batch[f"label.{task_name}"]).to_numpy(zero_copy_only=False)


def used_candidates(batch: pa.RecordBatch, manifest: schema.Manifest, task_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the label of every candidate, float [N] with NaN for not observed, and whether it counts, bool [N].

    A candidate counts if its label is observed and the label that the task is conditioned on, if any, is 1.
    """
    num_candidates_B = candidates_per_row(batch, task_name)
    label_N = per_candidate(batch[f"label.{task_name}"], f"label.{task_name}", num_candidates_B)
    is_used_N = ~np.isnan(label_N)
    given = find_task(manifest, task_name).given
    if given:
        is_used_N &= per_candidate(batch[f"label.{given}"], f"label.{given}", num_candidates_B) == 1
    return label_N, is_used_N


def per_candidate(column: pa.Array, name: str, num_candidates_B: np.ndarray) -> np.ndarray:
    """Flattens lists to one value per candidate and repeats values of a row. Floats hold null as NaN."""
    if pa.types.is_list(column.type):
        column = _flat(column, name, num_candidates_B)
        if pa.types.is_nested(column.type):
            raise ValueError(f"column {name!r} is a bag; a key needs one value per candidate")
        return column.to_numpy(zero_copy_only=False)
    return np.repeat(column.to_numpy(zero_copy_only=False), num_candidates_B)


def elements_per_candidate(
    column: pa.Array, feature: schema.Feature, place: str, num_candidates_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Flattens a candidate or context column: values [M] and lengths of candidates [N], all 1 but for bags.

    A value, or bag, of a row is repeated for each of its candidates.
    """
    if place == "candidate":
        column = _flat(column, f"candidate.{feature.name}", num_candidates_B)
    else:
        column = column.take(pa.array(np.repeat(np.arange(len(column)), num_candidates_B)))
    if not feature.is_bag:
        return column.to_numpy(zero_copy_only=False), np.ones(len(column), np.int64)
    length_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return pc.list_flatten(column).to_numpy(zero_copy_only=False), length_N


def _flat(column: pa.Array, name: str, num_candidates_B: np.ndarray) -> pa.Array:
    if not np.array_equal(pc.list_value_length(column).to_numpy(zero_copy_only=False), num_candidates_B):
        raise ValueError(f"column {name!r} does not hold one value per candidate; run data_pipeline.validate")
    return pc.list_flatten(column)
