"""Loads a trained run to score a data set with it, and writes the scores: what `evaluate`, `fit`, `predict` share."""

import collections.abc
import dataclasses
import json
import logging
import pathlib
import typing

from gpsd_dist.assembly import assemble, looked_up_tables, meta_model
from gpsd_dist.baselines.frequent_items import frequent_item_metrics
from gpsd_dist.checkpoint import loading, manager, storage
from gpsd_dist.checkpoint.state import RunState, as_then, read_run
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.config import OptimizerConfig, RunConfig, run_config_from_dict
from gpsd_dist.data import data_versions
from gpsd_dist.data.run_manifest import read_run_manifest, with_data_version
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics import breakdown
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.metrics.scores import scores_file
from gpsd_dist.parameter_names import dense_weight, table_weight
from gpsd_dist.schema import Manifest
from gpsd_dist.stages.finetune import Finetune
from gpsd_dist.stages.stage import Components, Metrics, evaluate_split

log = logging.getLogger(__name__)
TIMEOUT_S = 600
_ANY_SPARSE = OptimizerConfig("rowwise_adagrad", 0.0)  # never steps; runs anywhere, a CUDA-only one would not
_DESCRIBING_FIELDS = ("features", "tables", "tasks", "item_feature", "max_history_length")


def evaluate_checkpoint(
    checkpoint: str | pathlib.Path,
    data_dir: str | None,
    split: str,
    runtime: Runtime,
    which: str = "best",
    *,
    rank_cut: int | None = None,
    keep: dict[str, Predictions] | None = None,
    must_keep: bool = True,
    is_weighted: bool = False,
    min_item_count: int | None = None,
) -> Metrics:
    """Scores one split with a run folder's best (or last) checkpoint, or with a checkpoint folder; exact. Collective.

    `data_dir` None stands for the data that the run was trained on; `rank_cut` and `keep` are those of
    stages.stage.evaluate_split; unless `must_keep`, a stage other than finetuning may leave `keep` empty.
    `is_weighted`: as FinetuneConfig.weighted_metrics, whatever the run had.
    `min_item_count` needs `keep`, and adds `frequent_item_metrics` on rank 0.
    ValueError if the data set has other features, vocabularies or tasks than the run was trained with, or if nothing
    is ranked.
    """
    trained = load_trained(checkpoint, data_dir, split, runtime, which, is_weighted=is_weighted)
    log.info("scoring %s of %s with %s (step %d)", split, trained.run.data_dir, trained.folder, trained.step)
    if not must_keep and not isinstance(trained.components.stage, Finetune):
        keep = None
    metrics = evaluate_split(trained.run, trained.manifest, trained.components, split, rank_cut, keep)
    return with_frequent_items(metrics, trained.run.data_dir, keep, min_item_count) if runtime.is_main else metrics


def with_frequent_items(
    metrics: Metrics, data_dir: str, keep: dict[str, Predictions] | None, min_item_count: int | None
) -> Metrics:
    """Adds the AUC on candidates with `min_item_count` pretraining events or more, where that was asked for."""
    if not min_item_count or keep is None:
        return metrics
    added = frequent_item_metrics(keep, data_dir, min_item_count)
    return {task: values | added[task] for task, values in metrics.items()}


class TrainedRun(typing.NamedTuple):
    """Holds a checkpoint's model with its weights, ready to score a data set."""

    run: RunConfig  # as it was trained, with the data set that is to be scored
    manifest: Manifest
    components: Components
    folder: Location  # of the checkpoint
    step: int


def load_trained(
    checkpoint: str | pathlib.Path,
    data_dir: str | None,
    split: str,
    runtime: Runtime,
    which: str = "best",
    *,
    is_weighted: bool = False,
) -> TrainedRun:
    """Loads a run's model to score `split` of a data set (None: the one it was trained on). Collective.

    `is_weighted`: as in `evaluate_checkpoint`. ValueError if the data set has no such split, no such weights, or other
    features, vocabularies or tasks than the run's.
    """
    folder = manager.find_together(checkpoint, which)
    state = read_run(folder)
    run = run_config_from_dict(state.run_config)
    # In float32 on a CPU, however it was trained: any CPU gives these scores, and so does a server.
    execution = dataclasses.replace(run.execution, matmul_dtype="fp32")
    run = dataclasses.replace(run, sparse=_ANY_SPARSE, execution=execution)
    if data_dir:
        run = with_data_version(dataclasses.replace(run, data_dir=str(data_dir)))
    else:  # the version of the run, unless the split came later
        run = with_data_version(run, version_for(state, folder, split))
    manifest = read_run_manifest(run)
    check_same_schema(manifest, state.manifest, folder, run.data_dir)
    manifest.split(split)
    if is_weighted and run.stage == "pretrain":
        raise ValueError("--weighted: a pretrained run ranks items, which have no sample weights: leave it out")
    if is_weighted and "weight" not in manifest.sampling:
        raise ValueError(f"--weighted: {run.data_dir} has no weights; name their column (`weight`) and build it again")
    if is_weighted:
        run = dataclasses.replace(run, finetune=dataclasses.replace(run.finetune, weighted_metrics=True))
    _check_size(run, manifest, folder)
    components = assemble(run, manifest, runtime)
    loading.load_tensors(folder, components.weights())
    return TrainedRun(run, manifest, components, folder, state.step)


def version_for(state: RunState, checkpoint: Location, split: str = "") -> data_versions.Wanted:
    """Describes a version that a run can score: its own, or a later one with its vocabularies that has `split`."""
    return data_versions.Wanted(
        lambda manifest: not _differences(manifest, state.manifest) and bool(not split or manifest.split(split)),
        data_versions.name_of(state.run_config["data_dir"]),
        f"has the vocabularies that {checkpoint} was trained with{f', and a split {split!r}' if split else ''}",
    )


def _differences(manifest: Manifest, saved: dict) -> list[str]:
    current = as_then(json.loads(json.dumps(dataclasses.asdict(manifest))), saved)
    return [name for name in _DESCRIBING_FIELDS if current[name] != saved[name]]


def check_same_schema(manifest: Manifest, saved: dict, folder: Location, data_dir: str) -> None:
    """Raises ValueError if data have other features, vocabularies or tasks than a run was trained with."""
    different = _differences(manifest, saved)
    if different:
        raise ValueError(
            f"{data_dir} differs from what {folder} was trained on in {different}; score it on data that was built "
            "with the same vocabularies (build a later day with --split holdout)"
        )


def _check_size(run: RunConfig, manifest: Manifest, folder: Location) -> None:
    """Checks, before memory is taken, that the options in a checkpoint do not describe a larger model than it holds."""
    saved = loading.saved_sizes(folder)
    problem = f"{run.model.layers} layers" if run.model.layers > len(saved) else ""
    if not problem:  # on meta only modules cost something, and their number follows that of the layers
        sharded = looked_up_tables(run, manifest)
        model = meta_model(run, manifest, sharded)
        needed = {dense_weight(name): value.numel() for name, value in model.state_dict().items()}
        for table in sharded:
            needed[table_weight(table.name)] = table.num_rows * run.tables.stored_dim
        problem = ", ".join(name for name, size in needed.items() if saved.get(name) != size)
    if problem:
        raise ValueError(
            f"checkpoint {folder} does not fit this model: {problem[:500]} is not in it, or of another size"
        )


def with_breakdown(metrics: Metrics, keep: dict[str, Predictions] | None) -> dict[str, dict[str, typing.Any]]:
    """Adds to each task whose scores were kept what the report shows beside a score: `metrics.breakdown`."""
    made = {task: {breakdown.KEY: breakdown.breakdown(rows.scored())} for task, rows in (keep or {}).items()}
    return {task: values | made.get(task, {}) for task, values in metrics.items()}


def write_results(
    metrics: collections.abc.Mapping[str, collections.abc.Mapping[str, typing.Any]],
    metrics_out: pathlib.Path | None,
    keep: dict[str, Predictions] | None,
    scores_out: pathlib.Path | None,
) -> None:
    """Writes the files of --scores_out and --metrics_out, each whole or not at all; the metrics last."""
    if scores_out is not None and keep is not None:
        scores_out.parent.mkdir(parents=True, exist_ok=True)
        storage.write(scores_out, scores_file(keep))
    if metrics_out is not None:
        storage.write_json(metrics_out, metrics)
