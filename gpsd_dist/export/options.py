"""Says how to export. Needs no torch, because the command line is parsed with it."""

import dataclasses

from gpsd_dist.serving.artefact import MAX_CANDIDATES


@dataclasses.dataclass(frozen=True)
class Options:
    """Says how to export; `python -m gpsd_dist.export --help` has the words."""

    table_dtype: str = "fp32"
    engine: str = "eager"
    max_candidates: int = MAX_CANDIDATES
    accept_loss: bool = False
    replaces_current: bool = False
    accept_worse: bool = False
