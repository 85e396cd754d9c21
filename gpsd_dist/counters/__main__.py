"""ENTRY: refreshes the counters of an artefact: how often items occurred, for features of --counts. The model stays.

    python -m data_pipeline.build ... --append_to data/day1 --out_dir data/day2
    python -m gpsd_dist.counters --artefact artefacts/ctr --data data/day2

Servers load them as they load a new version (docs/serving.md, "Counters"). Older counters than those in use are left
alone. Ends with status 2 if the data count other features than the model reads.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.counters ...")

import argparse
import datetime
import pathlib

from gpsd_dist.disk.text import say_error


def main(argv: list[str]) -> int:
    """Returns 0, or 2 with one line if data or artefact do not fit."""
    parser = argparse.ArgumentParser(prog="python -m gpsd_dist.counters", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--artefact", type=pathlib.Path, required=True, help="folder of the artefact")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="prepared data, with newer events")
    args = parser.parse_args(argv)
    try:
        print(refresh(args.artefact.absolute(), args.data))
    except (ValueError, OSError) as error:
        return say_error(error)
    return 0


def refresh(root: pathlib.Path, data: pathlib.Path) -> str:
    """Makes the counters of the data those of the artefact; returns what happened, in words."""
    from gpsd_dist.data import data_versions
    from gpsd_dist.schema import read_manifest
    from gpsd_dist.serving import counters
    from gpsd_dist.serving.artefact import open_version

    folder, served = data_versions.opened(data), open_version(root).manifest
    manifest = read_manifest(folder)
    wanted, made = ({f.counts for f in each.features if f.counts is not None} for each in (served, manifest))
    if not wanted <= made or served.item_feature != manifest.item_feature:
        raise ValueError(f"the model counts {sorted(wanted)}, and {data} counts {sorted(made)}: build it with --counts")
    if not wanted:
        raise ValueError(f"the model of {root} reads no counts, so there is nothing to refresh")
    found = counters.from_data(folder, manifest)
    moment = datetime.datetime.fromtimestamp(found.as_of_s, datetime.UTC).isoformat()
    if counters.publish(root, found):
        return f"{root}: counters as of {moment}"
    return f"{root} keeps its counters, which are newer than {moment}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
