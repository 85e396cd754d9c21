"""ENTRY: estimates whether a run fits on a cluster. Needs no GPU and allocates no table.

    python -m gpsd_dist.plan --gin_file configs/stage/finetune.gin --gin_file configs/data/grocery.gin
        --world_size 64 --local_world_size 8 --hbm_gib 80 --table_rows item=100000000 --mean_history 40

Options that are not listed here are those of gpsd_dist.train. Prints the table layout that TorchRec's planner chooses,
and memory, traffic and FLOPs of a rank; if the run does not fit, what would help. The formulas are in the docstrings
of gpsd_dist/plan/. Exit status: 0 fits, 3 does not fit, 2 for a mistake in the options or the data.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.plan ...")

import argparse
import math
import pathlib

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.disk.text import log_as_text, say_error

FITS, MISTAKE, DOES_NOT_FIT = 0, 2, 3


def main(argv: list[str]) -> int:
    """Returns the exit status that the module's docstring lists."""
    args, rest = _parse(argv)
    if not any(argument.startswith("--gin.OUTPUT_DIR") for argument in rest):
        rest.append("--gin.OUTPUT_DIR=nothing-is-written")
    try:
        run = load_run_config(rest).run
        from gpsd_dist.plan.output import make_plan  # after the options: it imports torch

        return FITS if make_plan(run, args) else DOES_NOT_FIT
    except (ValueError, OSError) as error:
        return say_error(error)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(prog="python -m gpsd_dist.plan", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--world_size", type=int, required=True, help="ranks (GPUs) of the cluster")
    parser.add_argument(
        "--local_world_size", type=int, default=0, help="ranks of one machine (default: all, at most 8)"
    )
    parser.add_argument("--hbm_gib", type=float, required=True, help="memory of one GPU")
    rows_help = "sizes other than the data's"
    parser.add_argument("--table_rows", nargs="+", action="extend", default=[], metavar="TABLE=ROWS", help=rows_help)
    parser.add_argument("--mean_history", type=float, help="history tokens of a request (default: the data's mean)")
    parser.add_argument("--candidates", type=float, help="candidates of a request (default: the data's mean)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything there too")
    args, rest = parser.parse_known_args(argv)
    args.local_world_size = args.local_world_size or min(args.world_size, 8)
    for name in ("world_size", "local_world_size", "hbm_gib", "candidates"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} {value} must be above 0 and finite")
    if args.local_world_size > args.world_size:
        parser.error(f"--local_world_size {args.local_world_size} is larger than --world_size {args.world_size}")
    return args, rest


if __name__ == "__main__":
    log_as_text("%(levelname).1s %(message)s")
    sys.exit(run_main(main))
