"""Holds the options of tables without a vocabulary; what they do: docs/ids.md."""

import dataclasses
import typing

import pydantic

from gpsd_dist.schema import ID_KINDS, NUM_RESERVED_ROWS
from gpsd_dist.validation import AtLeast1, checked, one_of

EVICTIONS = ("lfu", "lru", "distance_lfu")


def _some_for_ids(rows: int) -> int:
    if rows <= NUM_RESERVED_ROWS:
        raise ValueError(f"is {rows}, expected more than the {NUM_RESERVED_ROWS} reserved rows")
    return rows


@checked()
class IdsConfig:
    """Changes tables whose columns hold 64-bit ids; what is not named here is as the data set was built."""

    kinds: dict[str, typing.Annotated[str, one_of(ID_KINDS)]] = dataclasses.field(default_factory=dict)
    """Table -> hashed | managed."""
    rows: dict[str, typing.Annotated[int, pydantic.AfterValidator(_some_for_ids)]] = dataclasses.field(
        default_factory=dict
    )
    """Table -> rows, the reserved ones of padding and unknown included."""
    admission_threshold: AtLeast1 = 2
    """managed: an id gets a row with this many occurrences in training batches; before, it reads the unknown row."""
    eviction: typing.Annotated[str, one_of(EVICTIONS)] = "lfu"
    """managed, who leaves a full table: lfu (fewest occurrences), lru (longest unseen), distance_lfu (fewest
    occurrences per step since the last one)."""
