"""Measures what old counters cost: AUC of an artefact whose counts end so many days before each request.

python -m benchmarks.counter_age --artefact artefacts/ctr --checkpoint runs/mine/nt --data data/mine --days 0,1,3

0: counters that know every event before the request, as training has them. Candidates are counted by their raw ids.
"""

import argparse
import sys

import numpy as np

from gpsd_dist.export.exporter import read_source
from gpsd_dist.export.gates import aucs
from gpsd_dist.export.raw_requests import read_requests
from gpsd_dist.schema import Feature
from gpsd_dist.serving import load
from gpsd_dist.serving.counters import Counters

DAY_S = 86_400


class Late(Counters):
    """Counts as counters would that were made a while before each request."""

    late_s = 0

    def count(self, feature: Feature, id_N: np.ndarray, time_s_N: np.ndarray) -> np.ndarray:
        """Counts as of that much earlier."""
        return super().count(feature, id_N, time_s_N - self.late_s)


def main(argv: list[str]) -> int:
    """Prints one line per age."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counter_age", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name in ("artefact", "checkpoint", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--days", default="0,1,3")
    args = parser.parse_args(argv)
    source, scorer = read_source(args.checkpoint, args.data), load(args.artefact, verify=False)
    reader = scorer.reader
    if reader.counters is None:
        raise SystemExit(f"{args.artefact} reads no counts; export a run on data that were built with --counts")
    reader.counters = late = Late(reader.counters._arrays, reader.counters.as_of_s)
    counted = {f"candidate.{f.name}" for f in scorer.manifest.features if f.counts is not None}
    reader.columns = tuple(name for name in reader.columns if name not in counted)  # rows bring them otherwise
    for days in map(float, args.days.split(",")):
        late.late_s = round(days * DAY_S)
        found = aucs(scorer, read_requests(source.run, source.manifest, args.split, reader))
        print(f"{args.split}, counters {days:g} days old: AUC {', '.join(f'{t} {v:.5f}' for t, v in found.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
