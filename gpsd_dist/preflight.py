"""Checks whether a run fits its data set and its model before anything is built; needs no process group.

Rules of one option stand beside it, and rules between options in `config/run.py`. Rules that need the manifest are
here, with those that only training has: an older run whose options break them can still be evaluated.
"""

import collections.abc
import logging

from gpsd_dist.cli.missing import how_to_install
from gpsd_dist.config import DataConfig, RunConfig
from gpsd_dist.config.model import MODELS, models_with
from gpsd_dist.metrics.mlflow_writer import is_installed
from gpsd_dist.schema import Manifest
from gpsd_dist.stages.registry import find
from gpsd_dist.tables.collections import lookup_tables
from gpsd_dist.validation import AUTO

log = logging.getLogger(__name__)
_Problems = collections.abc.Iterator[str]


def _padding_suits_the_model(run: RunConfig, manifest: Manifest) -> _Problems:
    """Other towers are not built for the packing of a padded batch."""
    able = models_with("takes_padded_batches")
    if run.execution.token_multiple and run.model.name not in able:
        yield f"token_multiple with model {run.model.name!r}: only the {', '.join(able)} runs on padded batches"


def _checkpointed_models_have_blocks(run: RunConfig, manifest: Manifest) -> _Problems:
    """Activation checkpointing keeps the input of a block: without blocks it would change nothing."""
    if run.execution.activation_checkpointing and not MODELS[run.model.name].has_blocks:
        given, able = f"activation_checkpointing with model {run.model.name!r}", ", ".join(models_with("has_blocks"))
        yield f"{given}: it has no blocks to compute again, only {able} have"


def _managed_tables_are_not_looked_up_ahead(run: RunConfig, manifest: Manifest) -> _Problems:
    """The map of a managed table gives an id its row during the step itself, which sparse_dist runs ahead of."""
    managed = sorted(name for name, kind in manifest.unbounded.items() if kind == "managed")
    if run.execution.pipeline == "sparse_dist" and managed:
        yield (
            f"pipeline 'sparse_dist' looks rows up ahead of their step, and those of the managed tables {managed} are "
            "known in it only: leave ExecutionConfig.pipeline at 'plain', or build the data with --hashed_features"
        )


def _managed_tables_are_whole(run: RunConfig, manifest: Manifest) -> _Problems:
    """A row that changes hands is emptied with its optimizer state: see `tables_kept_whole`."""
    for table in sorted(tables_kept_whole(run, manifest)):
        if run.tables.sharding.get(table) == "column_wise":
            yield f"table {table!r} has managed ids and is column_wise; make it row_wise or table_wise"


def _mlflow_is_installed(run: RunConfig, manifest: Manifest) -> _Problems:
    """Found now, on every rank alike: the thread of rank 0 that imports it ends no training."""
    if run.train.mlflow_uri and not is_installed():
        given = f"TrainConfig.mlflow_uri {run.train.mlflow_uri!r}"
        yield f"{given} needs MLflow, which is not installed: {how_to_install('mlflow')}; or leave the option out"


def _something_to_learn(run: RunConfig, manifest: Manifest) -> _Problems:
    """Refuses data that nothing can be learnt from, which a build with --allow_empty lets through."""
    name = "pretrain" if run.stage == "pretrain" else "train"
    split = next((split for split in manifest.splits if split.name == name), None)
    if split is None or not split.num_rows:
        fix = (
            "users need two events or more before the valid period" if name == "pretrain" else "correct its split rule"
        )
        yield f"split {name!r} of {run.data_dir} has no rows: there is nothing to train on; {fix}, and build it again"
    elif not split.num_history_tokens:
        yield (
            f"every history in split {name!r} of {run.data_dir} is empty, and the models here read histories: give the "
            "build a longer log of [history], or a task in `extends_history`; boosted trees need none: python -m "
            "gpsd_dist.evaluate --baseline gbdt"
        )
    observed = manifest.options.get("observed_labels")
    observed = observed if isinstance(observed, dict) else {}  # older data sets do not say
    for task in manifest.tasks if name == "train" else ():
        if observed.get(task.name) == 0 and run.finetune.task_weights.get(task.name, 1.0) > 0:
            yield (
                f"task {task.name!r} has no observed label in split 'train' of {run.data_dir}: correct its column and "
                f"build the data again, or leave it out: --gin.FinetuneConfig.task_weights='{{\"{task.name}\": 0.0}}'"
            )


def _validation_has_rows(run: RunConfig, manifest: Manifest) -> _Problems:
    """Early stopping and a best checkpoint would wait for a validation that never comes."""
    if manifest.split("valid").num_rows == 0 and (run.train.patience not in (0, AUTO) or run.train.best_metric):
        given = f"patience {run.train.patience} and best_metric {run.train.best_metric!r}"
        yield f"{given} need a valid split, and that of {run.data_dir} has no rows: leave them out"


def _validation_has_tasks(run: RunConfig, manifest: Manifest) -> _Problems:
    """A validation without a task has no metric that could choose the best checkpoint."""
    if manifest.split("valid").num_rows and not run.refit_of and not manifest.tasks:
        yield f"{run.data_dir} has no task, so there is nothing to score in 'valid'"


def _offset_is_a_number(run: RunConfig, manifest: Manifest) -> _Problems:
    """Log-odds are read as the log has them: a count, or what is seen as a logarithm, is another quantity."""
    numbers = [f for f in manifest.features_in("candidate") if f.kind == "numerical" and not f.log]
    names = {f.name: f for f in numbers if f.prior_exposures or not f.counts}
    given = run.finetune.offset
    if run.stage != "finetune" or not given:
        return
    if given not in names:
        fix = "with --rates 20" if given == "rates" else "with such a column, or with --rates 20"
        yield (
            f"FinetuneConfig.offset {given!r} is no numerical feature of candidates with log-odds in it; "
            f"{run.data_dir} has {list(names)}: name one, or build the data {fix} (docs/train.md)"
        )
    elif names[given].prior_exposures and run.finetune.task_weights.get(manifest.tasks[0].name, 1.0) == 0:
        yield (
            f"FinetuneConfig.offset {given!r} holds log-odds of {manifest.tasks[0].name!r}, whose weight is 0, and "
            "would be added to another task: give it a weight, or leave offset out"
        )


def _counted_items_have_a_vocabulary(run: RunConfig, manifest: Manifest) -> _Problems:
    """Items share hashed rows, and managed rows change hands: a bias or a count would be of several items."""
    pretrain, table = run.pretrain, manifest.feature(manifest.item_feature).table
    options = {name: getattr(pretrain, name) for name in ("log_q", "item_bias", "recent_days")}
    given = [name for name, value in options.items() if value]
    if given and run.stage == "pretrain" and table in manifest.unbounded:
        yield (
            f"PretrainConfig.{', '.join(given)} with {manifest.unbounded[table]} items: only items with a vocabulary "
            "have rows of their own; leave it out, or build the data without hashed or managed items"
        )


def _frozen_rows_are_old_rows(run: RunConfig, manifest: Manifest) -> _Problems:
    """Rows by number are old ones in a vocabulary alone: managed rows change hands, and hashed ones are of any id."""
    given = {} if run.tables.frozen_rows == AUTO else run.tables.frozen_rows
    for name, num_rows in given.items():
        if kind := manifest.unbounded.get(name):
            yield f"frozen_rows of table {name!r}, whose ids are {kind}: no row is known to be old; leave it out"
        elif num_rows > manifest.table(name).num_rows:
            here = f"{num_rows:,} of table {name!r}, which has {manifest.table(name).num_rows:,}"
            yield f"frozen_rows: {here} rows, so none would be trained; give fewer, or leave it out to freeze all"


RULES = (
    _mlflow_is_installed,
    _something_to_learn,
    _padding_suits_the_model,
    _checkpointed_models_have_blocks,
    _managed_tables_are_not_looked_up_ahead,
    _managed_tables_are_whole,
    _validation_has_rows,
    _validation_has_tasks,
    _offset_is_a_number,
    _counted_items_have_a_vocabulary,
    _frozen_rows_are_old_rows,
)
"""Every rule between a run and its data set; a rule yields what is wrong, and what to do."""


def check_options_against_data(run: RunConfig, manifest: Manifest) -> None:
    """Warns of options without effect. One ValueError names all that cannot be followed."""
    problems = [problem for rule in RULES for problem in rule(run, manifest)]
    if problems:
        raise ValueError("; ".join(problems))
    given = run.data.max_history_length
    if given > manifest.max_history_length and given != DataConfig.max_history_length:  # nobody asked for the default
        log.warning(
            "max_history_length %d has no effect: the data was built with histories of at most %d",
            given,
            manifest.max_history_length,
        )
    for name in run.model.unread():
        log.warning("%s %s has no effect on model %r", name, getattr(run.model, name), run.model.name)
    if manifest.split("valid").num_rows == 0:
        log.warning("%s has no valid rows: nothing is validated, and the last checkpoint counts", run.data_dir)
    if run.finetune.esmm and not any(task.given for task in manifest.tasks):
        log.warning("esmm has no effect: no task of the data set is given another one")


def tables_kept_whole(run: RunConfig, manifest: Manifest) -> set[str]:
    """Names the looked-up tables that may not be column_wise: trained ones with managed ids.

    Their rows change hands in training, and the optimizer state, which is emptied then, is not by row if columns are on
    several ranks.
    """
    tables = lookup_tables(manifest, run.tables, with_candidates=find(run.stage).with_candidates)
    looked_up = {table.name for table in tables}
    managed = {name for name, kind in manifest.unbounded.items() if kind == "managed"}
    return managed & looked_up - set(run.frozen_tables)
