"""ENTRY: writes an HTML page about runs: curves, strategy table, generalization gap, data, how to rerun.

    python -m gpsd_dist.report runs/kuairand --out report.html

RUN_DIR is a run folder of gpsd_dist.train, or a folder that contains some. The page needs no network and no script.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.report ...")

import argparse
import pathlib

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.text import say_error
from gpsd_dist.disk.writing import write


def main(argv: list[str]) -> int:
    """Returns 0, or 2 if a folder holds no run or the page cannot be written."""
    parser = Parser(prog="python -m gpsd_dist.report", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=pathlib.Path, help="run folder, or one above")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("report.html"), help="default: report.html")
    args = parser.parse_args(argv)
    from gpsd_dist.report.page import make_report  # after the options: it imports Jinja and the readers of runs

    try:
        report = make_report(args.run_dirs)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write(args.out, report.html.encode())
    except (ValueError, OSError) as error:
        return say_error(error)
    remarks = f", {report.num_problems} remarks on missing or broken files" if report.num_problems else ""
    print(f"{args.out}: {report.num_runs} runs, {len(report.html.encode()) / 1024:.0f} KiB{remarks}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
