"""Loads a checkpoint into tables that have grown since, by `data_pipeline.build --append_to`.

Old ids keep their rows in such a vocabulary, so the saved rows are the first rows of the table. The new rows start as
`TablesConfig.new_rows` says. The manifest's chain proves that one vocabulary grew from the other.
"""

import collections.abc
import dataclasses
import pathlib
import typing

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from gpsd_dist.config import RunConfig
from gpsd_dist.parameter_names import ITEM_BIAS, dense_weight, small_tables, table_weight
from gpsd_dist.schema import Manifest
from gpsd_dist.tables import new_rows


def ancestors(manifest: Manifest) -> dict[str, set[str]]:
    """Returns for each table the fingerprints of the smaller vocabularies that it grew from.

    `manifest` must have been read by `schema.read_manifest`, which checks the chain of fingerprints.
    """
    found: dict[str, set[str]] = {}
    for step in manifest.options.get("chain", []):
        for table in step["tables"]:
            if table["name"] not in manifest.unbounded:  # hashed and managed ids: another size is another mapping
                found.setdefault(table["name"], set()).add(table["fingerprint"])
    for table in manifest.tables:  # a day may bring no new id
        found.get(table.name, set()).discard(table.fingerprint)
    return found


def keys(
    manifest: Manifest,
    grown: collections.abc.Mapping[str, int],
    tables: typing.Iterable[str],
    dense: typing.Iterable[str],
) -> frozenset[str]:
    """Names the saved tensors of grown tables, sharded or small, and the bias of items, which begins at 0."""
    small = {parameter for name in grown for parameter in _small_tables(manifest, name)}
    small |= {ITEM_BIAS} if manifest.feature(manifest.item_feature).table in grown else set()
    names = [table_weight(name) for name in tables if name in grown]
    return frozenset([*names, *(dense_weight(name) for name in dense if name in small)])


def _small_tables(manifest: Manifest, table: str) -> tuple[str, ...]:
    return small_tables(table, [feature.name for feature in manifest.features if feature.table == table])


def fits(saved: tuple[int, ...], here: tuple[int, ...], may_grow: bool) -> bool:
    """Tells whether a tensor of shape `saved` can fill one of shape `here`."""
    if may_grow and len(saved) == len(here) and len(saved) > 0:
        return saved[0] <= here[0] and saved[1:] == here[1:]
    return saved == here


def start_new_rows(
    run: RunConfig,
    manifest: Manifest,
    grown: collections.abc.Mapping[str, int],
    tables: collections.abc.Mapping[str, typing.Any],
    dense: collections.abc.Mapping[str, typing.Any],
) -> list[str]:
    """Gives the new rows of grown tables their starting values, and describes every one in a line. Collective.

    `tables`, `dense`: live tensors by name that were loaded. Rows of a table that is in neither stay as they are.
    """
    lines = []
    for name, num_old in grown.items():
        num_new = manifest.table(name).num_rows - num_old
        loaded = [dense[parameter] for parameter in _small_tables(manifest, name) if parameter in dense]
        loaded += [tables[name]] if name in tables else []
        start = "random"
        for weight in loaded if run.tables.new_rows != "random" else ():
            is_item = name == manifest.feature(manifest.item_feature).table and run.tables.new_rows == "attributes"
            items = pathlib.Path(run.data_dir) / "items.parquet"
            alike = new_rows.shared_attributes(items, manifest, num_old) if is_item else {}
            new_rows.start_new_rows(weight, num_old, alike.values())
            start = "from the unknown row" + (f" and rows alike in {', '.join(alike)}" if alike else "")
        fate = ", and stay so: the table is frozen" if name in run.frozen_tables else ""
        fate = ", and are trained alone" if name in run.tables.frozen_rows else fate
        lines.append(f"  table {name!r} grew: {num_old:,} rows from the checkpoint, {num_new:,} new ones {start}{fate}")
    return lines


class Planner(dcp.DefaultLoadPlanner):
    """Reads the saved rows of the tensors named in `grown`; all others must have the saved size."""

    def __init__(self, grown: frozenset[str]):
        super().__init__()
        self._grown = grown

    def set_up_planner(
        self, state_dict: dict[str, typing.Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Enters grown tensors at their size of today, because DCP refuses a tensor whose size differs."""
        assert metadata is not None
        saved = dict(metadata.state_dict_metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        for key in self._grown:
            entry = saved[key]
            assert isinstance(entry, TensorStorageMetadata)
            saved[key] = dataclasses.replace(entry, size=self.state_dict[key].size())
        self.metadata = dataclasses.replace(metadata, state_dict_metadata=saved)
