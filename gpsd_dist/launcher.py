"""ENTRY: torchrun with an exit status that says how training ended. `python -m gpsd_dist.launcher TORCHRUN_ARGUMENTS`

    python -m gpsd_dist.launcher --nproc_per_node 2 --standalone -m gpsd_dist.train --gin_file ...

The arguments are those of torchrun: `torchrun --help`. The status is one of gpsd_dist/distributed/exit_codes.py. On
CPUs the ranks of this host are forked from one process, which imports torch and TorchRec once for all of them.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.launcher ...")

import os

from gpsd_dist.cli.main import run_main
from gpsd_dist.distributed import fork_server, huge_pages


def main(argv: list[str]) -> int:
    """Runs torchrun and returns the exit status, one of `exit_codes`."""
    if argv[:1] in (["-h"], ["--help"]):
        text = (__doc__ or "").removeprefix("ENTRY: ")
        sys.stdout.write(f"usage: python -m gpsd_dist.launcher TORCHRUN_ARGUMENTS\n\n{text}")
        return 0
    server = _server() if set(argv) & {*fork_server.COMMANDS} else None
    from gpsd_dist.distributed.elastic_agent import run

    return run(argv, server)


def _server() -> fork_server.ForkServer | None:
    """Starts what forks the ranks, before anything is imported that begins threads: ranks would lack them."""
    missing = huge_pages.environment()
    # What has started without huge pages cannot hand them on by a fork.
    return fork_server.start_server(os.environ | missing) if missing else fork_server.fork_server()


if __name__ == "__main__":
    sys.exit(run_main(main))
