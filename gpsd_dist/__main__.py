"""ENTRY: `python -m gpsd_dist COMMAND ...`, the same as `gpsd-dist COMMAND ...`."""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist ...")

from gpsd_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
