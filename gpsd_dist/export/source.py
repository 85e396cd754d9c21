"""Describes an export: the run."""

import dataclasses

from gpsd_dist.checkpoint.state import RunState
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import RunConfig
from gpsd_dist.schema import Manifest


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds the run that is exported: its checkpoint, options and data set."""

    checkpoint: Location
    state: RunState
    run: RunConfig
    manifest: Manifest
    """Manifest as the run sees it, with the splits of the data."""
