"""Serves trained ranking models from artefacts: `load`, then `Scorer.score`. Imports no torchrec."""
