"""Serves trained ranking models from artefacts: `load`, then `Scorer.score`. Imports no torchrec."""

import typing

if typing.TYPE_CHECKING:
    from gpsd_dist.serving.answer import Answer as Answer
    from gpsd_dist.serving.scorer import Scorer as Scorer
    from gpsd_dist.serving.scorer import load as load


def __getattr__(name: str) -> typing.Any:
    """Imports the scorer, and with it torch, when it is first asked for: the modules of HTTP need neither."""
    if name not in ("Answer", "Scorer", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpsd_dist.serving import scorer

    return getattr(scorer, name)
