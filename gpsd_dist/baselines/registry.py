"""Names every baseline and computes its metrics, which a model has to beat."""

import collections.abc
import functools
import os
import typing

if typing.TYPE_CHECKING:
    from gpsd_dist.metrics.classification import Predictions

NEXT_ITEM = "next_item_popularity"
NAMES = ("gbdt", "gbdt_refit", "popularity", "rates", NEXT_ITEM)
REFIT = " refit"
"""Ends the label of what was made again on train + valid."""
WORDS = {"popularity": "popularity", "rates": "smoothed rates", "gbdt": "boosted trees"}
WORDS |= {"gbdt_refit": f"boosted trees{REFIT}", NEXT_ITEM: "popularity"}
"""Name of a baseline -> its name in tables."""


def evaluate_baseline(
    name: str,
    data_dir: str | os.PathLike,
    split: str,
    tasks: collections.abc.Sequence[str] | None = None,
    *,
    rank_cut: int | None = None,
    max_history_length: int | None = None,
    window_days: float | None = None,
    keep: "dict[str, Predictions] | None" = None,
    is_weighted: bool = False,
) -> dict[str, dict[str, float | int]]:
    """Computes metrics per task (all tasks by default) of the baseline `name`, one of NAMES, on one split.

    The keys are a model's: those of `metrics.binary_metrics.classification_metrics`, or for NEXT_ITEM, which alone
    reads `rank_cut`, `max_history_length` and `window_days`, {"next_item": hr@K, ndcg@K, mrr}. `keep` gets the
    scores of each task, but for NEXT_ITEM. Sample weights enter every fit, and with `is_weighted` the metrics.
    ValueError for an unknown name, split or task.
    """
    if name not in NAMES:
        raise ValueError(f"there is no baseline {name!r}; choose one of {sorted(NAMES)}")
    # Only now: the options of `evaluate` name the baselines, and are parsed before torch is imported.
    from gpsd_dist import schema
    from gpsd_dist.baselines.next_item import rank_by_popularity
    from gpsd_dist.data import data_versions

    data_dir = data_versions.opened(data_dir)
    manifest = schema.read_manifest(data_dir)
    if not manifest.tasks:
        raise ValueError(f"{data_dir} has no task, so there is nothing to score")
    if is_weighted and "weight" not in manifest.sampling:
        raise ValueError(f"--weighted: {data_dir} has no weights; name their column (`weight`) and build it again")
    if name == NEXT_ITEM:
        options = (rank_cut, max_history_length, window_days)
        return {"next_item": rank_by_popularity(data_dir, manifest, split, *options)}
    tasks = [task.name for task in manifest.tasks] if tasks is None else tasks
    score = _scorer(name)
    predictions = {task: score(data_dir, manifest, split, task, is_weighted=is_weighted) for task in tasks}
    if keep is not None:
        keep |= predictions
    return {task: rows.metrics() for task, rows in predictions.items()}


def _scorer(name: str) -> "collections.abc.Callable[..., Predictions]":
    from gpsd_dist.baselines.gbdt import score_gbdt
    from gpsd_dist.baselines.rates import score_popularity, score_rates

    scorers: dict[str, collections.abc.Callable[..., Predictions]] = {
        "gbdt": score_gbdt,
        "gbdt_refit": functools.partial(score_gbdt, refit=True),
        "popularity": score_popularity,
        "rates": score_rates,
    }
    return scorers[name]
