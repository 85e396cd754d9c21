"""Checks whether a run fits its data set and its model before anything is built; needs no process group.

Rules of one option stand beside it, in `config/`; rules between options are in `RunConfig`; those that need the
manifest or the model are here.
"""

import logging

from gpsd_dist.config import RunConfig
from gpsd_dist.config.execution import BLOCK_MODELS
from gpsd_dist.schema import Manifest
from gpsd_dist.stages.registry import find
from gpsd_dist.tables.collections import lookup_tables

log = logging.getLogger(__name__)


def check_options_against_data(run: RunConfig, manifest: Manifest) -> None:
    """Warns of options without effect; ValueError for those that cannot be followed. Needs no process group."""
    _check_against_model(run)
    _check_against_tables(run, manifest)
    if run.data.max_history_length > manifest.max_history_length:
        log.warning(
            "max_history_length %d has no effect: the data was built with histories of at most %d",
            run.data.max_history_length,
            manifest.max_history_length,
        )
    for name in run.model.unread():
        log.warning("%s %s has no effect on model %r", name, getattr(run.model, name), run.model.name)
    if manifest.split("valid").num_rows == 0:
        if run.train.patience or run.train.best_metric:
            given = f"patience {run.train.patience} and best_metric {run.train.best_metric!r}"
            raise ValueError(f"{given} need a valid split, and that of {run.data_dir} has no rows: leave them out")
        log.warning("%s has no valid rows: nothing is validated, and the last checkpoint counts", run.data_dir)
    elif not run.refit_of and not manifest.tasks:
        raise ValueError(f"{run.data_dir} has no task, so there is nothing to score in 'valid'")
    if run.finetune.esmm and not any(task.given for task in manifest.tasks):
        log.warning("esmm has no effect: no task of the data set is given another one")


def tables_kept_whole(run: RunConfig, manifest: Manifest) -> set[str]:
    """Looked-up tables that may not be column_wise: rows of managed ones change hands in training, and their optimizer
    state, which is emptied then, is not by row if columns are on several ranks.
    """
    tables = lookup_tables(manifest, run.tables, with_candidates=find(run.stage).with_candidates)
    looked_up = {table.name for table in tables}
    frozen = set(run.tables.transfer if run.freezes_tables else ())
    return {name for name, kind in manifest.unbounded.items() if kind == "managed"} & looked_up - frozen


def _check_against_model(run: RunConfig) -> None:
    if run.execution.token_multiple and run.model.name != "transformer":
        raise ValueError(f"token_multiple with model {run.model.name!r}: only the transformer runs on padded batches")
    if run.execution.activation_checkpointing and run.model.name not in BLOCK_MODELS:
        given = f"activation_checkpointing with model {run.model.name!r}"
        raise ValueError(f"{given}: it has no blocks to compute again, only {', '.join(BLOCK_MODELS)} have")


def _check_against_tables(run: RunConfig, manifest: Manifest) -> None:
    managed = sorted(name for name, kind in manifest.unbounded.items() if kind == "managed")
    if run.execution.pipeline == "sparse_dist" and managed:
        raise ValueError(
            f"pipeline 'sparse_dist' looks rows up ahead of their step, and those of the managed tables {managed} are "
            "known in it only: leave ExecutionConfig.pipeline at 'plain', or build the data with --hashed_features"
        )
    for table in sorted(tables_kept_whole(run, manifest)):
        if run.tables.sharding.get(table) == "column_wise":
            raise ValueError(f"table {table!r} has managed ids and is column_wise; make it row_wise or table_wise")
