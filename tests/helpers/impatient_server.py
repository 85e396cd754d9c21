"""The server of `fake_server`, but it waits only 2 s for a body and 1 s for the next request: a program for tests."""

import sys

from tests.helpers import fake_server

if __name__ == "__main__":
    from gpsd_dist.serving import app, service

    app._READ_TIMEOUT_S, service._KEEP_ALIVE_S = 2, 1
    sys.exit(fake_server.main(sys.argv[1:]))
