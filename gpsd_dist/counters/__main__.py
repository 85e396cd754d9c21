"""ENTRY: refreshes the counters of an artefact: how often items occurred, for features of --counts. The model stays.

    python -m data_pipeline.build ... --append_to data/day1 --out_dir data/day2
    python -m gpsd_dist.counters --artefact artefacts/ctr --data data/day2

Servers load them as they load a new version (docs/serving.md, "Counters"). Ends with status 2, and changes nothing, if
the data do not count what the model reads, are of another log, or are older than the counters in use.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.counters ...")

import argparse
import os
import pathlib

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.text import say_error


def main(argv: list[str]) -> int:
    """Returns 0, or 2 with one line if nothing was replaced."""
    parser = Parser(prog="python -m gpsd_dist.counters", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--artefact", required=True, help="folder of the artefact")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="prepared data, with newer events")
    older_help = (
        "replace the counters even if they are newer or of other events: they are wrong, or an event's clock was"
    )
    parser.add_argument("--accept_older", action="store_true", help=older_help)
    args = parser.parse_args(argv)
    try:
        print(refresh(args.artefact, args.data, args.accept_older))
    except (ValueError, OSError) as error:
        return say_error(error)
    return 0


def refresh(artefact: str | os.PathLike[str], data: pathlib.Path, accept_older: bool = False) -> str:
    """Makes the counters of the data those of the artefact; returns what happened, in words."""
    from gpsd_dist.data import data_versions
    from gpsd_dist.schema import read_manifest
    from gpsd_dist.serving import counters
    from gpsd_dist.serving.artefact import locked, open_version

    folder = data_versions.opened(data)
    manifest, root = read_manifest(folder), open_version(artefact).root
    with locked(root):  # no export changes the version meanwhile
        served = open_version(root)
        if not counters.needs(served.manifest):
            raise ValueError(f"the model of {root} reads no counts, so there is nothing to refresh")
        counters.check_covers(manifest, data, served)
        found = counters.from_data(folder, manifest)
        if not accept_older:
            counters.check_same_log(root, served.manifest, found)
        if not counters.publish(root, found, accept_older):
            raise ValueError(
                f"{root} keeps its counters: they end later than those of {data}, as of {found.as_of}; use newer data, "
                "or replace counters that are wrong with --accept_older"
            )
    return f"{root}: counters as of {found.as_of}"


if __name__ == "__main__":
    sys.exit(run_main(main))
