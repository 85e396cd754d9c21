"""Parses the command line of `data_pipeline.build` into `options.BuildOptions`."""

import argparse

from data_pipeline import options, sources
from gpsd_dist.cli.names import Parser


def parse(argv: list[str], description: str | None = None) -> options.BuildOptions:
    """Parses the options of the pipeline and of the chosen source.

    An unknown option, or a value of the wrong type, ends the process with status 2 (argparse). Values out of range come
    together in one ValueError.
    """
    parser = Parser(
        prog="python -m data_pipeline.build",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog="A source has options of its own: --source NAME --help lists them.",
    )
    options.add_arguments(parser, options.BuildOptions, source=sorted(sources.SOURCES))
    # Which source it is, before anything else is parsed: --help lists the options of that source, too.
    first = argparse.ArgumentParser(prog="python -m data_pipeline.build", add_help=False, allow_abbrev=False)
    first.add_argument("--source")
    name = first.parse_known_args(argv)[0].source
    source = sources.load(name) if name in sources.SOURCES else None
    own_class = getattr(source, "Options", None)
    if own_class is not None:
        options.add_arguments(parser, own_class)
    given = vars(parser.parse_args(argv))
    return options.make(given["source"], own_class, getattr(source, "DEFAULTS", {}), given)
