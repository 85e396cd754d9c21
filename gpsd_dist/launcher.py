"""ENTRY: torchrun whose exit status says how the training ended. `python -m gpsd_dist.launcher TORCHRUN_ARGUMENTS`

torchrun itself ends with 0 or 1 and starts ranks again whatever they died of. Here the status is one of `exit_codes`,
ranks that end with MISTAKE are not started again (they would only repeat it), and ranks that are started again do not
read the addresses of the ranks before them.
"""

import os
import signal
import sys
import types
import typing

from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import ProcessFailure, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from gpsd_dist import exit_codes

_BY_IMPORTANCE = (exit_codes.MISTAKE, exit_codes.NO_FILE_ACCESS, exit_codes.HUNG, exit_codes.STOPPED)
"""Of several ranks the cause is told; the others fail because a rank is missing."""


class _Agent(LocalElasticAgent):
    def _monitor_workers(self, worker_group: typing.Any) -> typing.Any:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode == exit_codes.MISTAKE for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def main(argv: list[str]) -> int:
    """The exit status: one of `exit_codes`."""
    # launch_agent has no parameter for the agent's class; _remaining_restarts is read only in its _invoke_run:
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/launcher/api.py
    api.LocalElasticAgent = _Agent
    # Else all attempts share one store and its keys: a rank that is faster than its peers connects to the addresses of
    # the dead ones, and the restart fails (https://github.com/pytorch/pytorch/issues/135712; seen with torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: torchrun would stop at a lost terminal all the same
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun has handlers only once its ranks are started
        signal.signal(number, _raise_signal)
    try:
        torchrun.main(argv)
    except SignalException as error:
        status = exit_codes.INTERRUPTED if error.sigval == signal.SIGINT else exit_codes.STOPPED
        return _ended(f"got {error.sigval.name}, and has stopped its ranks", status)
    except ChildFailedError as error:
        status = _status(error.failures)
        ranks = ", ".join(f"rank {rank} with {_how(failure.exitcode)}" for rank, failure in error.failures.items())
        return _ended(f"ranks of this host have ended: {ranks}", status)
    except (RendezvousError, DistError) as error:  # of the launchers among themselves
        reason = (str(error.__cause__ or error) or repr(error)).splitlines()[0]
        return _ended(f"the nodes of this job do not reach each other: {reason}", exit_codes.FAILED)
    return exit_codes.FINISHED


def _raise_signal(number: int, frame: types.FrameType | None) -> None:
    raise SignalException(f"got signal {number}", signal.Signals(number))


def _status(failures: dict[int, ProcessFailure]) -> int:
    found = {failure.exitcode for failure in failures.values()}
    return next((status for status in _BY_IMPORTANCE if status in found), exit_codes.FAILED)


def _how(exitcode: int) -> str:
    if exitcode < 0:
        return f"signal {signal.Signals(-exitcode).name}"
    return f"status {exitcode} ({exit_codes.MEANINGS.get(exitcode, exit_codes.MEANINGS[exit_codes.FAILED])})"


def _ended(how: str, status: int) -> int:
    print(f"launcher: {how}; status {status}: {exit_codes.MEANINGS[status]}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
