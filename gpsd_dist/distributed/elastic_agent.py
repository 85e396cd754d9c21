"""Runs torchrun with an exit status that says how training ended; `gpsd_dist.launcher` is its command.

torchrun itself exits with 0 or 1, and restarts ranks after any failure. Here the status is one of `exit_codes`; ranks
that end with MISTAKE are not restarted, since they would fail again; restarted ranks do not read the addresses of dead
ones; `--standalone` opens no port to other machines. The first signal is passed on to the ranks. Further ones are
ignored, where torchrun would exit while ranks save.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import types
import typing

from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from gpsd_dist.distributed import exit_codes, huge_pages
from gpsd_dist.distributed.fork_server import Forked, ForkServer
from gpsd_dist.distributed.parent_watch import LAUNCHER_VARIABLE, STORE_VARIABLE

_BY_IMPORTANCE = (exit_codes.MISTAKE, exit_codes.NO_FILE_ACCESS, exit_codes.HUNG, exit_codes.STOPPED)
"""When several ranks fail, the first status of this list is reported: it is the cause, the other ranks follow."""


class _Agent(LocalElasticAgent):
    def _monitor_workers(self, worker_group: typing.Any) -> typing.Any:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode == exit_codes.MISTAKE for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def run(self, role: str = "default") -> typing.Any:
        try:
            return super().run(role)
        except SignalException as error:  # super().run has ended the ranks by now
            error.add_note(self._how_closed())
            raise

    def _how_closed(self) -> str:
        """Says whether this host's ranks ended by themselves. PContext sends the signal, waits, and kills the rest:

        https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/elastic/multiprocessing/api.py
        """
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        killed = [str(rank) for rank, part in handlers.items() if part.proc.poll() in (None, -signal.SIGKILL)]
        if not killed:
            return "its ranks have ended" if handlers else "it had not started its ranks"
        return (
            f"of its ranks, local rank {', '.join(killed)} did not end within {self._shutdown_timeout} s "
            "(TORCH_ELASTIC_SHUTDOWN_TIMEOUT) and was killed: what it had not saved is lost"
        )


def run(argv: list[str], server: ForkServer | None) -> int:
    """Runs torchrun and returns the exit status, one of `exit_codes`. `server` forks ranks, where there is one."""
    if server is not None:
        SubprocessHandler._popen = _popen_by(server)  # type: ignore[method-assign]
    # launch_agent has no parameter for the agent's class; _remaining_restarts is read only in its _invoke_run:
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/launcher/api.py
    api.LocalElasticAgent = _Agent
    # PContext.start installs this function for PET_SIGNALS_TO_HANDLE; torch's own one raises at every signal.
    processes._terminate_process_handler = _first_signal
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    os.environ.update(huge_pages.environment())  # for the ranks: this process has started without them
    # By default all attempts share one store and its keys: a rank that is faster than its peers connects to addresses
    # of dead ranks, and the restart fails (https://github.com/pytorch/pytorch/issues/135712; seen with torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # Under nohup, torchrun would still stop on SIGHUP.
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun installs its handlers only after it has started the ranks
        signal.signal(number, _first_signal)
    try:
        with tempfile.TemporaryDirectory(prefix="gpsd_job_", ignore_cleanup_errors=True) as folder:
            torchrun.main(_on_this_machine(argv, folder))
    except SignalException as error:
        status = exit_codes.INTERRUPTED if error.sigval == signal.SIGINT else exit_codes.STOPPED
        how = "; ".join(getattr(error, "__notes__", ["it had not started its ranks"]))
        return _ended(f"got {error.sigval.name}; {how}", status)
    except ChildFailedError as error:
        found = {failure.exitcode for failure in error.failures.values()}
        status = next((status for status in _BY_IMPORTANCE if status in found), exit_codes.FAILED)
        ranks = ", ".join(f"rank {rank} with {_how(failure.exitcode)}" for rank, failure in error.failures.items())
        return _ended(f"ranks of this host have ended: {ranks}", status)
    except (RendezvousError, DistError) as error:  # The launchers of the nodes could not meet.
        reason = (str(error.__cause__ or error) or repr(error)).splitlines()[0]
        return _ended(f"the nodes of this job do not reach each other: {reason}", exit_codes.FAILED)
    return exit_codes.FINISHED


def _popen_by(server: ForkServer) -> typing.Callable[..., subprocess.Popen | Forked]:
    """Makes the method that starts a rank; torch's own one does it where the server cannot.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/elastic/multiprocessing/subprocess_handler/
    """
    anew = SubprocessHandler._popen

    def popen(handler: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen | Forked:
        streams = (handler._stdout, handler._stderr)
        forked = server.start(args[1:], env, *streams, in_new_session=True) if args[0] == sys.executable else None
        return forked or anew(handler, args, env)

    return popen


def _on_this_machine(argv: list[str], folder: str) -> list[str]:
    """Lets the ranks of `--standalone` meet in files of `folder`, which this user alone can read.

    torchrun would listen on all addresses of the machine, and whoever reaches that port can run code in the launcher,
    because the state of a rendezvous is a pickle.
    """
    if "--standalone" not in argv[: argv.index("-m") if "-m" in argv else len(argv)]:
        return argv
    os.environ[STORE_VARIABLE] = os.path.join(folder, "ranks")
    where = ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-id", secrets.token_hex(8)]
    where += ["--rdzv-endpoint", os.path.join(folder, "launcher"), "--local-addr", "127.0.0.1"]
    place = argv.index("--standalone")
    return [*argv[:place], *where, *argv[place + 1 :]]


def _first_signal(number: int, frame: types.FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(other) == _first_signal:
            signal.signal(other, _later_signal)
    raise SignalException(f"got signal {number}", signal.Signals(number))


def _later_signal(number: int, frame: types.FrameType | None) -> None:
    """Reports an ignored signal once, by os.write: a handler must not use the buffers that it may have interrupted."""
    signal.signal(number, signal.SIG_IGN)
    name = signal.Signals(number).name
    line = f"launcher: got {name} as well, and does not heed it: it waits for its ranks to save and end"
    os.write(sys.stderr.fileno(), f"{line}; further ones are ignored\n".encode())


def _how(exitcode: int) -> str:
    if exitcode < 0:
        return f"signal {signal.Signals(-exitcode).name}"
    return f"status {exitcode} ({exit_codes.MEANINGS.get(exitcode, exit_codes.MEANINGS[exit_codes.FAILED])})"


def _ended(how: str, status: int) -> int:
    sys.stderr.write(f"launcher: {how}; status {status}: {exit_codes.MEANINGS[status]}\n")
    sys.stderr.flush()
    return status
