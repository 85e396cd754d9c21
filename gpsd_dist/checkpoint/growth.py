"""Loading into tables with more rows than the checkpoint has, after `data_pipeline.build --append_to`.

Old ids keep their rows in such a vocabulary, so that the saved rows are the first ones of the table. The new rows stay
as they were drawn, like those of a fresh table. The manifest's chain proves that one vocabulary grew from the other.
"""

import collections.abc
import dataclasses
import typing

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from gpsd_dist.config import RunConfig
from gpsd_dist.parameter_names import dense_weight, small_table, table_weight
from gpsd_dist.schema import Manifest


def ancestors(manifest: Manifest) -> dict[str, set[str]]:
    """Table -> fingerprints of the smaller vocabularies that it grew from. `manifest`: as read, so its chain is one."""
    found: dict[str, set[str]] = {}
    for step in manifest.options.get("chain", []):
        for table in step["tables"]:
            if table["name"] not in manifest.unbounded:  # those do not grow: another size is another mapping
                found.setdefault(table["name"], set()).add(table["fingerprint"])
    for table in manifest.tables:  # a day may bring no new id
        found.get(table.name, set()).discard(table.fingerprint)
    return found


def keys(
    grown: collections.abc.Mapping[str, int], tables: typing.Iterable[str], dense: typing.Iterable[str]
) -> frozenset[str]:
    """Dotted names of the tensors that belong to grown tables: sharded ones, and small ones of the token embedder."""
    small = {small_table(name) for name in grown}
    names = [table_weight(name) for name in tables if name in grown]
    return frozenset([*names, *(dense_weight(name) for name in dense if name in small)])


def fits(saved: tuple[int, ...], here: tuple[int, ...], may_grow: bool) -> bool:
    """Whether a saved shape can fill one of this run."""
    if may_grow and len(saved) == len(here) and len(saved) > 0:
        return saved[0] <= here[0] and saved[1:] == here[1:]
    return saved == here


def report(run: RunConfig, manifest: Manifest, grown: collections.abc.Mapping[str, int]) -> list[str]:
    """One line for every grown table."""
    lines = []
    for name, num_old in grown.items():
        num_rows = manifest.table(name).num_rows
        fate = ", and stay so: the table is frozen" if run.freezes_tables and name in run.tables.transfer else ""
        lines.append(
            f"  table {name!r} grew: {num_old:,} rows from the checkpoint, {num_rows - num_old:,} new ones random{fate}"
        )
    return lines


class Planner(dcp.DefaultLoadPlanner):
    """Reads the saved rows of the tensors named in `grown`; all others must have the saved size."""

    def __init__(self, grown: frozenset[str]):
        super().__init__()
        self._grown = grown

    def set_up_planner(
        self, state_dict: dict[str, typing.Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As in DCP, which refuses a tensor whose size differs: grown ones count as saved with the size of today."""
        assert metadata is not None
        saved = dict(metadata.state_dict_metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        for key in self._grown:
            entry = saved[key]
            assert isinstance(entry, TensorStorageMetadata)
            saved[key] = dataclasses.replace(entry, size=self.state_dict[key].size())
        self.metadata = dataclasses.replace(metadata, state_dict_metadata=saved)
