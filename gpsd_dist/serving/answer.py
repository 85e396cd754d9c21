"""Defines what a scorer answers. Needs no torch, so that HTTP and its tests do not either."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Answer:
    """Holds what is known about one request."""

    version: str
    tasks: dict[str, dict[str, list[float]]]
    """Task -> "logit" and "probability", one per candidate in the order of the request. A conditional task (conversion
    given click) also has "product": its probability times that of what it is given."""
    unknown_ids: int
    """Values of history, candidates and context that read the unknown row of their table."""
    dropped_events: int
    """Events at or after the time of the request, which the model must not see."""
    counters_age_s: int | None = None
    """How long before the request the counters of earlier events end; null where the model reads none."""
