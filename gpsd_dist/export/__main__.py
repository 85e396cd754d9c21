"""ENTRY: makes an artefact of a finetuned run: all that serving needs, as an immutable version (docs/serving.md).

    python -m gpsd_dist.export --checkpoint runs/mine/st_sf --data data/mine --out artefacts/ctr
    python -m gpsd_dist.export verify artefacts/ctr              # reads every file, replays the examples
    python -m gpsd_dist.export use artefacts/ctr VERSION         # back to an older version
    python -m gpsd_dist.export parity artefacts/ctr --checkpoint runs/mine/st_sf --data data/mine

`verify` ends with status 1 if the artefact is damaged, or scores its examples otherwise than when it was exported; it
needs no TorchRec. `parity` serves the artefact, and ends with status 1 if raw requests get other logits than `evaluate`
gives their rows. An export that is refused (worse, or less exact than allowed) or has a mistake ends with status 2.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.export ...")

import argparse
import logging
import pathlib

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.text import log_as_text, say_error
from gpsd_dist.export.options import Options
from gpsd_dist.serving.artefact import CURRENT_NAME, DTYPES, ENGINES, ArtefactError, make_current, open_version


def main(argv: list[str]) -> int:
    """Returns 0, 1 for a damaged artefact, or 2 for a mistake or a refusal."""
    log_as_text("%(message)s", stream=sys.stdout)
    logging.getLogger("gpsd_dist").setLevel(logging.INFO)  # not what FBGEMM tells of every table
    try:
        commands = {"verify": _verify, "use": _use, "parity": _parity}
        if not argv or argv[0].startswith("-"):
            return _export(argv)
        if argv[0] not in commands:
            known = ", ".join(commands)
            raise ValueError(f"there is no {argv[0]!r}: name one of {known}, or options alone to export (--help)")
        return commands[argv[0]](argv[1:])
    except (ValueError, OSError) as error:
        return say_error(error)


def _verify(argv: list[str]) -> int:
    parser = Parser(prog="python -m gpsd_dist.export verify", allow_abbrev=False)
    parser.add_argument("artefact", help="folder of the artefact (its current version), or of a version")
    args = parser.parse_args(argv)
    from gpsd_dist.serving.examples import EXPECTED_NAME, replay, replay_search
    from gpsd_dist.serving.retriever import ITEM_VECTORS, Retriever
    from gpsd_dist.serving.scorer import Scorer

    try:
        artefact = open_version(args.artefact)
        artefact.check_hashes()
        if ITEM_VECTORS not in artefact.description.tables:
            difference = replay(Scorer(artefact))
        elif EXPECTED_NAME in artefact.description.files:
            difference = replay_search(Retriever(artefact))
        else:
            raise ArtefactError(f"{artefact.folder} was indexed before an index had examples to replay; build it again")
    except ArtefactError as error:
        return say_error(error, mistake=1)
    sums = artefact.sums()
    num_bytes = sum(entry.num_bytes for entry in sums.values())
    examples = f"examples differ by {difference:.2g}, at most {artefact.description.tolerance:g} is allowed"
    print(f"{artefact.version}: {len(sums)} files, {num_bytes:,} bytes, all as written; {examples}")
    return 0


def _use(argv: list[str]) -> int:
    parser = Parser(prog="python -m gpsd_dist.export use", allow_abbrev=False)
    parser.add_argument("artefact", help="folder of the artefact")
    parser.add_argument("version", help="name of a folder in its versions/")
    args = parser.parse_args(argv)
    make_current(args.artefact, args.version)
    print(f"{args.artefact} is now {args.version}")
    return 0


def _parity(argv: list[str]) -> int:
    parser = Parser(prog="python -m gpsd_dist.export parity", allow_abbrev=False)
    parser.add_argument("artefact", type=pathlib.Path, help="folder of the artefact; its current version is served")
    parser.add_argument("--checkpoint", required=True, help="the run that it was exported from")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run folder")
    parser.add_argument("--data", required=True, help="prepared data")
    parser.add_argument("--split", default="test", help="split to take requests from (default test)")
    parser.add_argument("--requests", type=int, default=100, help="how many (default 100)")
    args = parser.parse_args(argv)
    from gpsd_dist.export.exporter import TOLERANCE, read_source
    from gpsd_dist.export.parity import largest_difference

    source = read_source(args.checkpoint, args.data, args.which)
    requests, logits, difference = largest_difference(source, args.artefact, args.split, args.requests)
    verdict = "served = evaluated" if difference <= TOLERANCE else "served is not evaluated"
    text = f"{requests} raw requests of {args.split} over HTTP, {logits} logits, largest difference {difference:.2g}"
    print(f"{verdict}: {text} (at most {TOLERANCE:g} is allowed)")
    return 0 if difference <= TOLERANCE else 1


def _export(argv: list[str]) -> int:
    parser = Parser(prog="python -m gpsd_dist.export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", required=True, help="folder of a finetuned run, or one checkpoint in it")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run folder")
    parser.add_argument("--data", required=True, help="prepared data: vocabularies, items, train and valid")
    parser.add_argument("--out", required=True, help="folder of the artefact; versions are added to it")
    parser.add_argument("--table_dtype", choices=DTYPES, default="fp32", help="of looked-up tables (default fp32)")
    parser.add_argument("--engine", choices=ENGINES, default="eager", help="what computes the model (default eager)")
    limit = Options.max_candidates
    parser.add_argument("--max_candidates", type=int, default=limit, help=f"of a request (default {limit})")
    loss_help = "export fp16 or int8 tables even if they change the AUC on valid by more than 1e-4 or 5e-4"
    parser.add_argument("--accept_loss", action="store_true", help=loss_help)
    replaces_help = "refuse a version that is worse than the current one on the newest day with labels in --data"
    parser.add_argument("--replaces", choices=("current",), help=replaces_help)
    parser.add_argument("--accept_worse", action="store_true", help="measure, but export it even if it is worse")
    args = parser.parse_args(argv)
    if args.max_candidates < 1:
        parser.error(f"--max_candidates {args.max_candidates} must be at least 1")
    if args.accept_worse and not args.replaces:
        parser.error("--accept_worse goes with --replaces current")
    if args.replaces and not pathlib.Path(args.out, CURRENT_NAME).is_file():
        parser.error(f"--replaces current: {args.out} has no current version to compare with; leave it out")
    options = Options(
        args.table_dtype, args.engine, args.max_candidates, args.accept_loss, bool(args.replaces), args.accept_worse
    )
    from gpsd_dist.export.exporter import export, read_source  # need TorchRec, which `verify` must not

    export(read_source(args.checkpoint, args.data, args.which), args.out, options)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
