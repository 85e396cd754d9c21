"""ENTRY: indexes the items of a pretrained run, and finds the items that raw histories ask for.

    python -m gpsd_dist.index build  --checkpoint runs/mine/pretrain --data data/mine --out artefacts/retrieval
    python -m gpsd_dist.index search artefacts/retrieval --requests raw.parquet --top 500 --out found/
    python -m gpsd_dist.index users  artefacts/retrieval --requests raw.parquet --out users/
    python -m gpsd_dist.index items  artefacts/retrieval --out items/

Requests are Parquet files with the history columns of docs/serving.md. `search` compares every item, exactly, and
leaves out those of the visible history. `users` and `items` write the unit vectors, for a search of your own. All but
`build` need no TorchRec.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.index ...")

import argparse
import logging
import pathlib

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.text import log_as_text, say_error


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m gpsd_dist.index", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="write an artefact of a pretrained run", allow_abbrev=False)
    build.add_argument("--checkpoint", required=True, help="folder of a pretrained run, or one checkpoint in it")
    build.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run folder")
    build.add_argument("--data", required=True, help="prepared data: vocabularies and items")
    build.add_argument("--out", required=True, help="folder of the artefact; versions are added to it")
    items_help = (
        "Parquet file with a column item_id: search these raw ids alone (needed where items are hashed, managed)"
    )
    build.add_argument("--items", type=pathlib.Path, help=items_help)
    for name, what in (("search", "find items"), ("users", "encode histories"), ("items", "write item vectors")):
        part = commands.add_parser(name, help=what, allow_abbrev=False)
        part.add_argument("artefact", help="folder of the artefact (its current version), or of a version")
        if name != "items":
            help_text = "Parquet file of raw requests, or a folder of such files"
            part.add_argument("--requests", type=pathlib.Path, required=True, help=help_text)
        if name == "search":
            part.add_argument("--top", type=int, default=100, help="items per request (default 100)")
        part.add_argument("--out", type=pathlib.Path, required=True, help="folder to write, new or empty")
    args = parser.parse_args(argv)
    if args.command == "search" and args.top < 1:
        parser.error(f"--top {args.top} must be at least 1")
    return args


def main(argv: list[str]) -> int:
    """Returns 0, or 2 for a mistake in the options or the data."""
    log_as_text("%(message)s", stream=sys.stdout)
    logging.getLogger("gpsd_dist").setLevel(logging.INFO)  # not what FBGEMM tells of its libraries
    args = _parse(argv)
    try:
        if args.command == "build":
            from gpsd_dist.index.build import build  # needs TorchRec

            build(args.checkpoint, args.data, args.out, args.which, args.items)
            return 0
        from gpsd_dist.index import output
        from gpsd_dist.serving.retriever import load

        retriever = load(args.artefact)
        if args.command == "search":
            rows = output.search(retriever, args.requests, args.top, args.out)
        elif args.command == "users":
            rows = output.users(retriever, args.requests, args.out)
        else:
            rows = output.items(retriever, args.out)
        print(f"{rows:,} rows by {retriever.version}: {args.out}")
        return 0
    except (ValueError, OSError) as error:
        return say_error(error)


if __name__ == "__main__":
    sys.exit(run_main(main))
