"""The synthetic shop: generated into --raw_dir if that folder is missing or empty, then read like any `generic` log.

To choose sizes, generate first: python -m data_pipeline.synthesize --out_dir RAW --num_users ... --seed ...
"""

import argparse
import pathlib

from data_pipeline import canonical, synthesize, synthetic_log
from data_pipeline.engine import Engine
from data_pipeline.sources import generic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--synthetic_seed, used only when the log is generated."""
    parser.add_argument("--synthetic_seed", type=int, default=0, help="of the generated log, where --raw_dir is empty")
    parser.set_defaults(schema=None)
    generic.mark_defaults(parser)


def find_files(raw_dir: pathlib.Path | None, options: argparse.Namespace) -> dict[str, pathlib.Path]:
    """Generates the log if there is none; then the files that its schema.toml names."""
    if raw_dir is None:
        raise ValueError("--raw_dir is missing; the synthetic log is read from it, or generated into it if it is empty")
    if not raw_dir.exists() or (raw_dir.is_dir() and not any(raw_dir.iterdir())):
        synthesize.write(synthetic_log.SyntheticConfig(seed=options.synthetic_seed), raw_dir)
    return generic.find_files(raw_dir, options)


def read(engine: Engine, files: dict[str, pathlib.Path], options: argparse.Namespace) -> canonical.Log:
    """As `generic`."""
    return generic.read(engine, files, options)
