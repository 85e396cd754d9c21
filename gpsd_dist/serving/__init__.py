"""Serves trained ranking models from artefacts: `load`, then `Scorer.score`. Imports no torchrec."""

from gpsd_dist.serving.scorer import Answer as Answer
from gpsd_dist.serving.scorer import Scorer as Scorer
from gpsd_dist.serving.scorer import load as load
