"""Every baseline by name, and their metrics: the floor that a model has to clear."""

import collections.abc
import functools
import os
import pathlib

from gpsd_dist import schema
from gpsd_dist.baselines.gbdt import score_gbdt
from gpsd_dist.baselines.rates import score_popularity, score_rates
from gpsd_dist.metrics.classification import Predictions

BASELINES: dict[str, collections.abc.Callable[..., Predictions]] = {
    "gbdt": score_gbdt,
    "gbdt_refit": functools.partial(score_gbdt, refit=True),
    "popularity": score_popularity,
    "rates": score_rates,
}


def evaluate_baseline(
    name: str, data_dir: str | os.PathLike, split: str, tasks: collections.abc.Sequence[str] | None = None
) -> dict[str, dict[str, float | int]]:
    """Metrics per task (all tasks by default) of the baseline `name`, a key of BASELINES, on one split.

    The same keys as `metrics.classification.classification_metrics`. ValueError for an unknown name, split or task.
    """
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}; choose one of {sorted(BASELINES)}")
    manifest = schema.read_manifest(pathlib.Path(data_dir))
    tasks = [task.name for task in manifest.tasks] if tasks is None else tasks
    return {task: BASELINES[name](data_dir, manifest, split, task).metrics() for task in tasks}
