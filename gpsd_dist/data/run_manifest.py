"""Reads the manifest as a run sees it: its options replace kind and size of tables without a vocabulary."""

import dataclasses

from gpsd_dist.config import RunConfig
from gpsd_dist.config.ids import IdsConfig
from gpsd_dist.data import data_versions
from gpsd_dist.distributed.main_rank import on_main
from gpsd_dist.schema import Manifest, Table, read_manifest, unbounded_fingerprint


def read_run_manifest(run: RunConfig) -> Manifest:
    """Reads the manifest of `run.data_dir` with the options `run.ids`. ValueError if one of the two is wrong."""
    return with_id_options(read_manifest(run.data_dir), run.ids)


def with_data_version(run: RunConfig, wanted: data_versions.Wanted | None = None) -> RunConfig:
    """Returns the run with the folder of one version as `data_dir`: that which rank 0 finds and marks. Collective.

    The manifest that `wanted.fits` gets is the one that the run sees. ValueError if no version fits.
    """
    if wanted is not None:
        fits = wanted.fits
        wanted = dataclasses.replace(wanted, fits=lambda manifest: fits(with_id_options(manifest, run.ids)))
    return dataclasses.replace(run, data_dir=on_main(lambda: str(data_versions.opened(run.data_dir, wanted))))


def with_id_options(manifest: Manifest, config: IdsConfig) -> Manifest:
    """Changes kinds and sizes of tables. ValueError for one that has a vocabulary, or does not exist."""
    named = {*config.kinds, *config.rows}
    wrong = sorted(named - set(manifest.unbounded))
    if wrong:
        raise ValueError(
            f"IdsConfig names tables {wrong}, but those with 64-bit ids are {sorted(manifest.unbounded)}; build the "
            "data with --hashed_features or --managed_features"
        )
    kinds = manifest.unbounded | config.kinds

    def resized(table: Table) -> Table:
        if table.name not in named:
            return table
        rows = config.rows.get(table.name, table.num_rows)
        return Table(table.name, rows, unbounded_fingerprint(kinds[table.name], rows))

    return dataclasses.replace(manifest, unbounded=kinds, tables=tuple(resized(table) for table in manifest.tables))
