"""Collects scores of candidates on every rank, and computes their exact metrics over all ranks (`binary_metrics`)."""

import collections.abc

import numpy as np
import torch
import torch.distributed as dist

from gpsd_dist.distributed.main_rank import on_main
from gpsd_dist.metrics.binary_metrics import KINDS, SECONDS_PER_DAY, classification_metrics
from gpsd_dist.metrics.breakdown import ScoredRows

_MESSAGE_ROWS = 1 << 24  # rows per message when gathering; keeps one message below 128 MiB


class Predictions:
    """Collects scores and labels of one task on this rank, on the CPU: 17 bytes per row.

    A row is its score (float32), label (uint8), user_hash (int64) and the UTC day of its request (int32). With items,
    12 bytes more hold the table index of its candidate and the length of its history. If rows have weights, 4 bytes
    more hold them (float32).
    """

    def __init__(self, kind: str = "logit", *, with_items: bool = False, with_weights: bool = False):
        """Takes scores of one `kind`: "logit", or "score" (good for ranking metrics only)."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {KINDS}")
        self.kind, self.with_items, self.with_weights = kind, with_items, with_weights
        of_items = [np.int64, np.int32] * with_items
        dtypes = (np.float32, np.uint8, np.int64, np.int32, *of_items, *[np.float32] * with_weights)
        self._chunks = [tuple(np.empty(0, dtype) for dtype in dtypes)]

    def __len__(self) -> int:
        return sum(len(columns[0]) for columns in self._chunks)

    def add(
        self,
        score_N,
        label_N,
        user_hash_N,
        is_observed_N=None,
        time_s_N=None,
        item_N=None,
        weight_N=None,
        history_N=None,
    ):
        """Appends N rows, tensors or arrays: score, label 0 or 1, int64 hash of the user. Copies to the CPU (GPU sync).

        `is_observed_N`: bool [N], None means all; rows that are not observed are left out and may hold anything.
        `time_s_N`: int64 epoch seconds of the requests; None, or a negative time, means unknown. Requests of unknown
        time share one day, so without any time `gauc_user_day` is `gauc`.
        `item_N`: table indices int64, needed and read only with items.
        `history_N`: events in the history of the request, read with items alone; None means unknown, -1.
        `weight_N`: how often each row counts, float32 of at least 0; needed and read only with weights.
        ValueError for lengths that differ, labels other than 0 and 1, scores not finite.
        """
        score_N, label_N, user_hash_N = _array(score_N, np.float32), _array(label_N), _array(user_hash_N, np.int64)
        time_s_N = np.full(score_N.shape, -1) if time_s_N is None else _array(time_s_N, np.int64)
        more = []
        if self.with_items:
            history_N = np.full(score_N.shape, -1) if history_N is None else history_N
            more = [_array(item_N, np.int64), _array(history_N, np.int32)]
        more += [_array(weight_N, np.float32)] if self.with_weights else []
        columns: tuple[np.ndarray, ...] = (score_N, label_N, user_hash_N, _day(time_s_N), *more)
        if score_N.ndim != 1 or any(column.shape != score_N.shape for column in columns):
            shapes = [column.shape for column in columns]
            names = "score, label, user_hash, time, item, history and weight"
            raise ValueError(f"expected {names} as vectors of one length, got shapes {shapes}")
        if is_observed_N is not None:
            is_observed_N = _array(is_observed_N, np.bool_)
            if is_observed_N.shape != score_N.shape:
                raise ValueError(f"is_observed has shape {is_observed_N.shape}, the scores have {score_N.shape}")
            columns = tuple(column[is_observed_N] for column in columns)
        score_N, label_N, *others = columns
        self._check(score_N, label_N)
        self._chunks.append((score_N, label_N.astype(np.uint8), *others))

    def _check(self, score_N: np.ndarray, label_N: np.ndarray) -> None:
        is_bad = ~((label_N == 0) | (label_N == 1))
        if is_bad.any():
            raise ValueError(
                f"{is_bad.sum()} of {len(label_N)} labels are not 0 or 1, the first is {label_N[is_bad][0]!r}"
            )
        is_bad = ~np.isfinite(score_N)
        if is_bad.any():
            found = f"{is_bad.sum()} of {len(score_N)} scores ({self.kind})"
            raise ValueError(f"{found} are not finite, the first is {score_N[is_bad][0]!r}")

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Returns this rank's rows in the order of `add`: score float32 [N], label uint8, user_hash int64, day int32.

        With items their table indices and the lengths of the histories follow, then the weights if rows have them.
        """
        if len(self._chunks) > 1:
            self._chunks = [tuple(map(np.concatenate, zip(*self._chunks)))]
        return self._chunks[0]

    def items(self) -> np.ndarray:
        """Returns the table index of each candidate, int64 [N]. ValueError if they were not collected."""
        if not self.with_items:
            raise ValueError(
                "these predictions were collected without items; make them by Predictions(with_items=True)"
            )
        return self.arrays()[4]

    def scored(self) -> ScoredRows:
        """Returns this rank's rows by name, for `breakdown`."""
        columns = self.arrays()
        item_N, history_N = columns[4:6] if self.with_items else (None, None)
        weight_N = columns[-1] if self.with_weights else None
        score_N, label_N, user_hash_N, day_N = columns[:4]
        return ScoredRows(self.kind, score_N, label_N, user_hash_N, day_N, item_N, history_N, weight_N)

    def select(self, is_kept_N: np.ndarray) -> "Predictions":
        """Returns the rows where bool [N], in the order of `arrays`, is true."""
        selected = Predictions(self.kind, with_items=self.with_items, with_weights=self.with_weights)
        selected._chunks = [tuple(column[is_kept_N] for column in self.arrays())]
        return selected

    def metrics(self) -> dict[str, float | int]:
        """Computes the metrics of this rank's rows only; `gather_metrics` covers all ranks."""
        score_N, label_N, user_hash_N, day_N = self.arrays()[:4]
        weight_N = self.arrays()[-1] if self.with_weights else None
        return classification_metrics(score_N, label_N, user_hash_N, self.kind, day_N, weight_N)

    def gather(self) -> "Predictions":
        """Sends all rows to rank 0, which needs memory for them; other ranks get an empty object.

        Collective if there is a process group; without one, these are all rows. Ranks may hold different numbers of
        rows, also none. ValueError if they hold different kinds of scores.
        """
        if not dist.is_initialized():
            return self
        own_2 = torch.tensor([len(self), KINDS.index(self.kind)])
        all_2 = [torch.empty_like(own_2) for _ in range(dist.get_world_size())]
        dist.all_gather(all_2, own_2)
        counts, kinds = torch.stack(all_2).T.tolist()
        if len(set(kinds)) > 1:
            raise ValueError(f"ranks hold different kinds of scores: {[KINDS[kind] for kind in kinds]}")

        gathered = Predictions(self.kind, with_items=self.with_items, with_weights=self.with_weights)
        columns = self.arrays()
        if dist.get_rank() == 0:
            gathered._chunks.append(columns)
            for source in range(1, len(counts)):
                gathered._chunks.append(tuple(_receive(c.dtype, counts[source], source) for c in columns))
        else:
            for column in columns:
                for part in torch.from_numpy(column).split(_MESSAGE_ROWS):
                    if len(part):
                        dist.send(part, 0)
        return gathered


def gather_metrics(
    predictions: collections.abc.Mapping[str, Predictions], keep: dict[str, Predictions] | None = None
) -> dict[str, dict[str, float | int]]:
    """Computes METRIC_KEYS per task over the rows of all ranks. Collective: all ranks must call with the same tasks.

    Rank 0 gathers the rows and computes, one task after the other. It broadcasts the few numbers, so every rank returns
    the same, or fails alike. `keep` gets the gathered rows of each task on rank 0.
    """
    results = {}
    for task in sorted(predictions):  # ranks may have built their dicts in different orders
        gathered = predictions[task].gather()
        results[task] = on_main(gathered.metrics)
        if keep is not None and (not dist.is_initialized() or dist.get_rank() == 0):
            keep[task] = gathered
    return {task: results[task] for task in predictions}


def _day(time_s_N: np.ndarray) -> np.ndarray:
    """Returns the UTC day int32 [N] of epoch seconds; -1 for an unknown (negative) time."""
    return np.where(time_s_N < 0, -1, time_s_N // SECONDS_PER_DAY).astype(np.int32)


def _array(values, dtype: type | None = None) -> np.ndarray:
    """Copies to a numpy array, so that the caller may reuse its buffer."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()  # numpy has no bfloat16
    return np.array(values, dtype=dtype)


def _receive(dtype: np.dtype, rows: int, source: int) -> np.ndarray:
    """Receives one column of one rank, in messages of at most _MESSAGE_ROWS rows."""
    column = np.empty(rows, dtype)
    for part in torch.from_numpy(column).split(_MESSAGE_ROWS):
        if len(part):
            dist.recv(part, source)
    return column
