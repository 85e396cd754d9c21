"""`gpsd_dist.launcher` that forks the ranks of these tests too, as it forks those of gpsd_dist.train on CPUs.

A fault that signals its parent process must not be run by it: the parent is the server that forks. A rank whose peer
was killed ends at once here, and the launcher may name either.
"""

import sys

from gpsd_dist import launcher
from gpsd_dist.distributed import fork_server

if __name__ == "__main__":
    fork_server.COMMANDS += ("tests.faults.entry",)
    sys.exit(launcher.main(sys.argv[1:]))
