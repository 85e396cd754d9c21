"""Lets rank 0 do something for all ranks. Needs no torch where there is no process group."""

import collections.abc
import sys
import typing

if typing.TYPE_CHECKING:
    import torch.distributed

from gpsd_dist.disk.reading import NotReadableNow

T = typing.TypeVar("T")


class FailedOnMain(RuntimeError):
    """Raised on all ranks for a failure of rank 0 that is neither a ValueError nor an OSError."""


def on_main(work: collections.abc.Callable[[], T], group: "torch.distributed.ProcessGroup | None" = None) -> T:
    """Does `work` on rank 0 and returns its result on all ranks. Collective if there is a process group.

    If it fails, all ranks raise alike: ValueError, OSError or FailedOnMain with its text.
    """
    # Whoever joined a group has imported torch; `checkpoint list` and its like never wait for that.
    dist = sys.modules.get("torch.distributed")
    in_group = dist is not None and dist.is_initialized()
    outcome: list[typing.Any] = [None, None]
    if dist is None or not in_group or dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            kinds = (ValueError, NotReadableNow, OSError)
            outcome[1] = next(kind for kind in kinds if isinstance(error, kind))(str(error))
        except Exception as error:
            outcome[1] = FailedOnMain(described(error))
    if dist is not None and in_group:
        dist.broadcast_object_list(outcome, src=0, group=group)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def described(error: BaseException) -> str:
    """Returns the message of an error, with its type in front unless it is an OSError, whose message says enough."""
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
