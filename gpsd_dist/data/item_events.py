"""Counts the events of items in the days before a moment, as a running counter would: for scores, and for their floors.

Shape letters: N events, V rows of the item table, P pairs of an item and a moment, R items, B moments.
"""

import os
import typing

import numpy as np
import pyarrow.compute as pc
import torch

from gpsd_dist.data.split_batches import read_batches
from gpsd_dist.schema import Manifest

SECONDS_PER_DAY = 86_400
_EVENTS_PER_PAIR = 8  # A pair takes two searches, about as long as so many events in one pass; untuned
_AT_ONCE = 1 << 22  # events that wait to be compared with those that were found: 96 MiB, untuned


class ItemEvents:
    """Holds when each item occurred. A count is that of [moment - window, moment): never of the moment itself.

    A moment after the newest event counts as the second behind it, so that an old log is late, and not empty. Takes 8
    bytes per event, on one device.
    """

    def __init__(self, item_N: torch.Tensor, time_s_N: torch.Tensor):
        """`item_N`, `time_s_N`: int64, in any order."""
        self._first_s = int(time_s_N.min()) if len(time_s_N) else 0
        self._span = int(time_s_N.max()) - self._first_s + 2 if len(time_s_N) else 2
        self._code_N = (item_N * self._span + (time_s_N - self._first_s)).sort().values
        largest = int(item_N.bincount().max()) if len(item_N) else 0
        self.logs = torch.arange(largest + 1, dtype=torch.float64, device=item_N.device).log1p()
        """log(1 + count) of every count that there can be, float64."""

    def __len__(self) -> int:
        return len(self._code_N)

    def to(self, device: torch.device) -> "ItemEvents":
        """Copies the events to a device."""
        moved = ItemEvents.__new__(ItemEvents)
        moved._first_s, moved._span = self._first_s, self._span
        moved._code_N, moved.logs = self._code_N.to(device), self.logs.to(device)
        return moved

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the arguments of `ItemEvents` by name, sorted by item and time."""
        item_N = self._code_N // self._span
        return {"item_N": item_N, "time_s_N": self._code_N - item_N * self._span + self._first_s}

    def count(self, item_P: torch.Tensor, time_s_P: torch.Tensor, window_s: int) -> torch.Tensor:
        """Counts for pairs, whose shapes are broadcast: integers. An unknown moment (-1) has no events before it."""
        begin_P, end_P = self._window(time_s_P, window_s)
        first_P = item_P * self._span
        return self._place(first_P + end_P) - self._place(first_P + begin_P)

    def count_all(self, item_R: torch.Tensor, time_s_B: torch.Tensor, window_s: int) -> torch.Tensor:
        """Counts every item at every moment: integers [B, R]. On a CPU few pairs cost as in `count`, many a pass.

        The pass is over the events between the first beginning of a window and the last end, and over the pairs.
        """
        # The other way has sizes that depend on the data, for which the host would wait, and needs a moment.
        if item_R.is_cuda or not len(time_s_B):
            return self.count(item_R, time_s_B[:, None], window_s)
        # An event counts for the moments behind it that see it: one more where these begin, one less where they end.
        item_U, place_R = item_R.unique(return_inverse=True)
        order_B = time_s_B.argsort()
        begin_B, end_B = self._window(time_s_B[order_B], window_s)
        ends_2 = (begin_B[:1], end_B[-1:])  # of all windows together
        first_U, stop_U = (self._place(item_U * self._span + end) for end in ends_2)
        length_U = stop_U - first_U
        if len(item_R) * len(time_s_B) * _EVENTS_PER_PAIR < int(length_U.sum()):
            return self.count(item_R, time_s_B[:, None], window_s)
        row_E = torch.repeat_interleave(length_U)
        code_E = self._code_N[torch.arange(len(row_E)) + (first_U - (length_U.cumsum(0) - length_U))[row_E]]
        moment_E = code_E - item_U[row_E] * self._span
        from_E = torch.searchsorted(end_B, moment_E, right=True)
        to_E = torch.searchsorted(begin_B, moment_E, right=True)
        steps = torch.zeros(len(item_U), len(time_s_B) + 1, dtype=torch.int32)
        flat, start_E, one = steps.view(-1), row_E * steps.shape[1], torch.ones((), dtype=torch.int32)
        flat.index_add_(0, start_E + from_E, one.expand(len(row_E)))
        flat.index_add_(0, start_E + to_E, -one.expand(len(row_E)))
        counts = steps.cumsum(1, dtype=torch.int32)
        return counts.t()[order_B.argsort()][:, place_R]

    def _window(self, time_s_P: torch.Tensor, window_s: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives both ends of the windows before moments, as seconds since the first event."""
        end_P = (time_s_P - self._first_s).clamp(max=self._span - 1)
        return (end_P - window_s).clamp(min=0), end_P.clamp(min=0)

    def _place(self, code_P: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self._code_N, code_P)


def window_seconds(days: float) -> int:
    """Rounds a window to seconds."""
    return round(days * SECONDS_PER_DAY)


def read_item_events(
    data_dir: str | os.PathLike, manifest: Manifest, splits: typing.Sequence[str]
) -> tuple[ItemEvents, int]:
    """Reads histories, and positives of the first task, of some splits; also returns how many events have no time.

    An event in several of them (user, item, second) counts once. ValueError where no event has a time.
    """
    name, num_untimed = manifest.item_feature, 0
    parts, num_waiting = [np.zeros((3, 0), np.int64)], 0  # those that were found, and what came since
    history, candidate, label = f"history.{name}", f"candidate.{name}", "label."
    for split in (split for split in manifest.splits if split.name in splits and split.num_rows):
        columns = [history, "history.time_s", "user_hash"]
        if split.name != "pretrain" and manifest.tasks:
            label = f"label.{manifest.tasks[0].name}"
            columns += ["request_time_s", candidate, label]
        for batch in read_batches(data_dir, manifest, split.name, columns):
            user_hash_B = batch["user_hash"].to_numpy()
            time_s = pc.list_flatten(batch["history.time_s"])
            request_N = pc.list_parent_indices(batch[history]).to_numpy()
            item_N = pc.list_flatten(batch[history]).to_numpy(zero_copy_only=False)
            is_timed_N = pc.is_valid(time_s).to_numpy(zero_copy_only=False)
            time_s_N = pc.fill_null(time_s, 0).to_numpy(zero_copy_only=False)
            num_untimed += int((~is_timed_N).sum())
            parts.append(np.stack([time_s_N, user_hash_B[request_N], item_N])[:, is_timed_N])
            if candidate in columns:
                request_P, target_P = positives(batch, candidate, label)
                parts.append(
                    np.stack([batch["request_time_s"].to_numpy()[request_P], user_hash_B[request_P], target_P])
                )
            num_waiting += len(time_s_N)
            # Every row repeats the history of its user, so all rows together take many times the memory of the events.
            if num_waiting > max(_AT_ONCE, parts[0].shape[1]):
                parts, num_waiting = [np.unique(np.concatenate(parts, axis=1), axis=1)], 0
    if not any(part.shape[1] for part in parts):
        raise ValueError(
            "--window_days, like PretrainConfig.recent_days, needs the time of events, but "
            f"{data_dir} has none; leave the option out"
        )
    events_3N = np.unique(np.concatenate(parts, axis=1), axis=1)
    return ItemEvents(torch.from_numpy(events_3N[2].copy()), torch.from_numpy(events_3N[0].copy())), num_untimed


def positives(batch: typing.Any, candidate: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Finds the candidates with label 1 of a batch of rows: (row int64 [P], item int64 [P]). ValueError if torn."""
    if not pc.list_value_length(batch[candidate]).equals(pc.list_value_length(batch[label])):
        raise ValueError(f"columns {candidate!r} and {label!r} do not hold one value per candidate")
    is_positive_C = pc.list_flatten(batch[label]).to_numpy(zero_copy_only=False) == 1
    request_P = pc.list_parent_indices(batch[candidate]).to_numpy()[is_positive_C]
    return request_P, pc.list_flatten(batch[candidate]).to_numpy()[is_positive_C]
