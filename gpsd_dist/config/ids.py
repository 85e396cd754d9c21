"""Options of tables without a vocabulary. Neither gin nor torch is imported here; what they do: docs/ids.md."""

import dataclasses

from gpsd_dist.schema import ID_KINDS, NUM_RESERVED_ROWS
from gpsd_dist.validation import below, check_types, raise_all

EVICTIONS = ("lfu", "lru", "distance_lfu")


@dataclasses.dataclass(frozen=True)
class IdsConfig:
    """Of tables whose columns hold 64-bit ids; what is not named here is as the data set was built."""

    kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    """Table -> hashed | managed."""
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    """Table -> rows, padding and unknown included."""
    admission_threshold: int = 2
    """managed: an id gets a row with this many occurrences in training batches; before, it reads the unknown row."""
    eviction: str = "lfu"
    """managed, who leaves a full table: lfu (fewest occurrences), lru (longest unseen), distance_lfu (fewest
    occurrences per step since the last one)."""

    def __post_init__(self) -> None:
        check_types(self)
        problems = below(self, "admission_threshold", 1)
        if self.eviction not in EVICTIONS:
            problems.append(f"eviction {self.eviction!r} is not one of {EVICTIONS}")
        for table, kind in self.kinds.items():
            if kind not in ID_KINDS:
                problems.append(f"kind of table {table!r} is {kind!r}, not one of {ID_KINDS}")
        for table, rows in self.rows.items():
            if rows <= NUM_RESERVED_ROWS:
                problems.append(f"table {table!r} has {rows} rows, expected more than the {NUM_RESERVED_ROWS} reserved")
        raise_all(self, problems)
