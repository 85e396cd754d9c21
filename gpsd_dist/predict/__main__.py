"""ENTRY: scores candidates and writes Parquet files with raw ids: those of a prepared split, or of raw requests.

    python -m gpsd_dist.predict --checkpoint runs/kr/st_sf --data data/kuairand --split test --out scores/
    python -m gpsd_dist.predict --artefact artefacts/ctr --requests raw.parquet --out scores/

The first also runs under torchrun. Labels are not needed: where the data have none, the label columns are null. The
second needs no TorchRec. Its requests are a Parquet file, or a folder of them such as that of
`gpsd_dist.serve --log_requests`, with the columns of docs/serving.md; logged scores are compared with the new ones.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.predict ...")

import argparse
import pathlib
import shlex

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.text import say_error


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the options; ends the program with status 2 for those that cannot be meant."""
    parser = Parser(prog="python -m gpsd_dist.predict", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    scorer = parser.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--checkpoint", help="run folder, or one checkpoint in it; or the URL of one")
    scorer.add_argument("--artefact", help="folder of an exported model, or of a version in it; goes with --requests")
    which_help = "checkpoint of a run folder (best on valid)"
    parser.add_argument("--which", choices=("best", "last"), default="best", help=which_help)
    parser.add_argument("--data", help="prepared data; default: the data the run was trained on")
    parser.add_argument("--split", default="test", help="split to score (default: test)")
    parser.add_argument("--requests", type=pathlib.Path, help="Parquet file of raw requests, or a folder of such files")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write, new or empty")
    args = parser.parse_args(argv)
    if bool(args.artefact) != bool(args.requests):
        parser.error("--artefact and --requests go together; --checkpoint scores a split of --data")
    return args


def main(argv: list[str]) -> int:
    """Returns 0, or 2 for a mistake in the options or the data."""
    args = parse(argv)
    command = shlex.join(["python", "-m", "gpsd_dist.predict", *argv])
    try:
        return _of_requests(args, command) if args.artefact else _of_split(args, command)
    except (ValueError, OSError) as error:
        return say_error(error)


def _of_split(args: argparse.Namespace, command: str) -> int:
    from gpsd_dist.distributed.runtime import process_group
    from gpsd_dist.predict.split import predict_split
    from gpsd_dist.trained_run import TIMEOUT_S, load_trained

    with process_group(TIMEOUT_S) as runtime:
        trained = load_trained(args.checkpoint, args.data, args.split, runtime, args.which)
        summary = predict_split(trained, args.split, args.out, runtime, command)
    if runtime.is_main:
        scored = f"{summary['candidates']:,} candidates of {summary['requests']:,} requests"
        print(f"{scored} scored by {summary['checkpoint']} ({summary['version']}): {args.out}")
    return 0


def _of_requests(args: argparse.Namespace, command: str) -> int:
    from gpsd_dist.predict.requests import predict_requests
    from gpsd_dist.serving.scorer import load

    summary = predict_requests(load(args.artefact), args.requests, args.out, command)
    scored = f"{summary['candidates']:,} candidates of {summary['requests']:,} requests"
    print(f"{scored} scored by {summary['artefact']} ({summary['version']}): {args.out}")
    for what, count in summary["counts"].items():
        print(f"  {what}: {count:,}")
    for task, difference in summary["largest_difference"].items():
        print(f"  {task}: logged logits of this version and its counters differ by at most {difference:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
