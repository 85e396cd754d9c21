"""Reads the synthetic shop like any `generic` log; generates it into --raw_dir if that folder is missing or empty.

To choose sizes, generate first: python -m data_pipeline.synthesize --out_dir RAW --num_users ... --seed ...
"""

import pathlib

import pydantic.dataclasses

from data_pipeline import canonical, explain, synthesize, synthetic_log
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions, option
from data_pipeline.sources import generic


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=explain.STRICT)
class Options:
    """Holds the options of this source."""

    synthetic_seed: int = option(0, "of the generated log, where --raw_dir is empty")
    schema: pathlib.Path | None = option(None, is_flag=False)
    """None: the log is always read by the description that lies beside it."""


def complete(options: BuildOptions) -> BuildOptions:
    """Generates the log if there is none; then takes the defaults of its schema.toml, as `generic` does."""
    raw_dir = options.raw_dir
    if raw_dir is None:
        raise ValueError("--raw_dir is missing; the synthetic log is read from it, or generated into it if it is empty")
    if not raw_dir.exists() or (raw_dir.is_dir() and not any(raw_dir.iterdir())):
        synthesize.write(synthetic_log.SyntheticConfig(seed=options.own.synthetic_seed), raw_dir)
    return generic.complete(options)


def find_files(options: BuildOptions) -> dict[str, pathlib.Path]:
    """Finds the files that the log's schema.toml names."""
    return generic.find_files(options)


def read(engine: Engine, files: dict[str, pathlib.Path], options: BuildOptions) -> canonical.Log:
    """Reads the log as `generic` does."""
    return generic.read(engine, files, options)
