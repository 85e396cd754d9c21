"""Finds features without a vocabulary: their columns hold 64-bit ids, and the trainer finds the rows (docs/ids.md)."""

import dataclasses

from data_pipeline import canonical, vocab
from data_pipeline.options import BuildOptions
from gpsd_dist import schema


@dataclasses.dataclass(frozen=True)
class Unbounded:
    """Describes one table without a vocabulary."""

    kind: str
    """hashed | managed"""
    num_rows: int

    def vocabulary(self, name: str) -> vocab.Vocabulary:
        """Returns the entry of this table in a plan: rows hold ids, and there are no words to write."""
        digest = schema.unbounded_fingerprint(self.kind, self.num_rows)
        return vocab.Vocabulary(None, schema.Table(name, self.num_rows, digest))


def tables(options: BuildOptions, log: canonical.Log) -> dict[str, Unbounded]:
    """Finds how the ids of each table become rows. ValueError for a feature that is not there or is no category."""
    known = {spec.name: spec.feature().table for spec in log.features if spec.kind == "categorical"}
    found: dict[str, Unbounded] = {}
    for kind in schema.ID_KINDS:
        option = f"{kind}_features"
        for entry in filter(None, (part.strip() for part in getattr(options, option).split(","))):
            name, _, rows = entry.partition(":")
            if name not in known:
                raise ValueError(f"--{option} {entry!r}: {name!r} is not a categorical feature of {sorted(known)}")
            if not rows.replace("_", "").isdigit() or int(rows) <= schema.NUM_RESERVED_ROWS:
                raise ValueError(f"--{option} {entry!r}: expected NAME:ROWS with ROWS > {schema.NUM_RESERVED_ROWS}")
            made = Unbounded(kind, int(rows))
            if found.setdefault(known[name], made) != made:
                raise ValueError(f"--{option} {entry!r}: table {known[name]!r} of this feature is {found[known[name]]}")
    return found
