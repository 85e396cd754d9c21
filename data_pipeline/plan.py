"""Defines the `Plan`: everything that one build writes. `build.py` executes it, whichever of three modes made it.

`fresh` plans a new data set, `append` the next day of one, `holdout` a later split of one. They differ in the rows that
they choose, in where vocabularies come from, and in the splits that the manifest names afterwards; how rows are
encoded, written and checked is the same for all.
"""

import dataclasses
import pathlib
import typing

from data_pipeline import sequences, vocab
from data_pipeline.options import BuildOptions
from data_pipeline.previous import Previous
from gpsd_dist import schema


@dataclasses.dataclass(frozen=True)
class Job:
    """Holds what a mode makes a plan of, besides the log."""

    options: BuildOptions
    previous: Previous | None
    """The data set that rows are added to."""
    prints: dict[str, typing.Any]
    """Raw files, recorded options and their fingerprint, as `fingerprint.describe` returns them."""
    command: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Says which rows are written, with which vocabularies, into which splits."""

    rows: sequences.Rows
    vocabularies: dict[str, vocab.Vocabulary]
    """One entry per embedding table, in the order of the manifest."""
    splits: dict[str, str]
    """Split that is written -> folder of its part files."""
    manifest: schema.Manifest
    """Holds what is known before anything is written: features and tasks decide the columns of the files."""
    finish: typing.Callable[[schema.Manifest, dict[str, schema.Split], pathlib.Path], schema.Manifest]
    """Completes the manifest (which has its tables by then) by the written splits, which lie in that folder."""
    linked_files: tuple[str, ...] = ()
    """Part files of the previous data set that the new one keeps."""
