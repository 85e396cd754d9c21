"""Describes an export: the run, and the options."""

import dataclasses

from gpsd_dist.checkpoint.state import RunState
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import RunConfig
from gpsd_dist.schema import Manifest
from gpsd_dist.serving.requests import Limits


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds the run that is exported: its checkpoint, options and data set."""

    checkpoint: Location
    state: RunState
    run: RunConfig
    manifest: Manifest
    """Manifest as the run sees it, with the splits of the data."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Says how to export; `python -m gpsd_dist.export --help` has the words."""

    table_dtype: str = "fp32"
    engine: str = "eager"
    max_candidates: int = Limits.max_candidates
    accept_loss: bool = False
    replaces_current: bool = False
    accept_worse: bool = False
