"""`python -m tests.faults.run [NAME ...]`: every fault (or those named), one after the other, and a last line that sums
up. Exit status 1 if a run was lost.
"""

import argparse
import pathlib
import sys
import tempfile
import time
import traceback

import pytest
from torch.distributed.checkpoint import CheckpointException

from tests.faults import soak, storm
from tests.faults.cases import CASES
from tests.faults.jobs import Workshop


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--soak", nargs="?", type=float, const=30.0, metavar="MINUTES", help="then a long run (30)")
    parser.add_argument("--storm", nargs="?", type=int, const=52, metavar="MOMENTS", help="then kills at random (52)")
    args = parser.parse_args(argv)
    names = args.names or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"{unknown} are no faults; there are {list(CASES)}")
    tried = survived = lost = 0
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        workshop = Workshop(pathlib.Path(folder))
        for name in names:
            begin_s = time.monotonic()
            try:
                steps = CASES[name](workshop)
                survived, lost, outcome = survived + 1, lost + steps, f"survived, {steps} steps lost"
            except pytest.skip.Exception as reason:
                print(f"{name}: not tried: {reason}", flush=True)
                continue
            except (Exception, CheckpointException):  # the latter is none of the former
                traceback.print_exc()
                outcome = "NOT SURVIVED"
            tried += 1
            print(f"{name}: {outcome} ({time.monotonic() - begin_s:.0f} s)", flush=True)
    print(f"{tried} faults tried, {survived} survived, {lost} steps lost")
    is_good = tried == survived
    if args.storm:
        is_good &= storm.main(["--moments", str(args.storm)]) == 0
    if args.soak:
        is_good &= soak.main(args.soak)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
