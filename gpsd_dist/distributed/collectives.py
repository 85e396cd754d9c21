"""Wraps the collectives that are called directly: sums, ragged gathers, and work that rank 0 does for all ranks."""

import collections.abc
import typing

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gpsd_dist.disk.reading import NotReadableNow

T = typing.TypeVar("T")


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums over ranks, in place. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Gathers every rank's tensor, in rank order. First dimensions may differ, the others must agree. Collective."""
    if dist.get_world_size() == 1:
        return [tensor]
    own = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    rows = [int(count) for count in counts]
    padding = [0, 0] * (tensor.dim() - 1) + [0, max(rows) - tensor.shape[0]]
    gathered = [tensor.new_empty((max(rows), *tensor.shape[1:])) for _ in rows]
    dist.all_gather(gathered, F.pad(tensor, padding).contiguous())
    return [part[:count] for part, count in zip(gathered, rows, strict=True)]


class FailedOnMain(RuntimeError):
    """Raised on all ranks for a failure of rank 0 that is neither a ValueError nor an OSError."""


def on_main(work: collections.abc.Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Does `work` on rank 0 and returns its result on all ranks. Collective if there is a process group.

    If it fails, all ranks raise alike: ValueError, OSError or FailedOnMain with its text.
    """
    outcome: list[typing.Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            kinds = (ValueError, NotReadableNow, OSError)
            outcome[1] = next(kind for kind in kinds if isinstance(error, kind))(str(error))
        except Exception as error:
            outcome[1] = FailedOnMain(described(error))
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=group)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def described(error: BaseException) -> str:
    """Returns the message of an error, with its type in front unless it is an OSError, whose message says enough."""
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
