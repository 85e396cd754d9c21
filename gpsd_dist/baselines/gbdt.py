"""Fits gradient-boosted trees (LightGBM) on hand-made features: the strong baseline without a sequence model.

The trees are fitted on `train`; their number is where the log loss on `valid` is least. `refit` then fits that many
trees on `train` and `valid`, as `REFIT_OF` does for a model. To score `valid` itself, the number of trees is chosen on
the latest part of `train`, and then all of `train` is fitted. The features are those of `gbdt_features`.
"""

import logging
import os

import numpy as np

from gpsd_dist import schema
from gpsd_dist.baselines import gbdt_features, rows
from gpsd_dist.baselines.gbdt_features import Examples
from gpsd_dist.metrics.classification import Predictions

log = logging.getLogger(__name__)
FIT_SPLIT, STOP_SPLIT = "train", "valid"
MAX_TREES = 2000
PATIENCE_TREES = 100
TAIL_SHARE = 0.2  # latest part of train, where the trees are counted when valid is scored; untuned
PARAMETERS = {  # chosen on valid of Grocery and KuaiRand, where they hardly matter
    "objective": "binary",
    "metric": "binary_logloss",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 10.0,
    "deterministic": True,
    "force_row_wise": True,  # LightGBM asks for it beside `deterministic`: its own choice depends on timings
    "verbosity": -1,
}


def score_gbdt(
    data_dir: str | os.PathLike,
    manifest: schema.Manifest,
    split: str,
    task: str,
    *,
    seed: int = 0,
    num_threads: int = 1,
    refit: bool = False,
    is_weighted: bool = False,
) -> Predictions:
    """Scores a split with one model for one task. Equal data, seed and version give equal bits with any threads.

    Rows where the label is not observed, or the task's condition is not 1, are neither trained on nor scored. The loss
    of the trees is weighted by sample weights (scaled to a mean of 1), and by 1 / rate where a negative was sampled;
    features are not. `is_weighted`: metrics take sample weights too. ValueError if `split` has `train` in it, a split
    is missing or has no such row, or both classes are not there.
    """
    if FIT_SPLIT in split.split("+"):
        raise ValueError(
            f"split {split!r} cannot be scored: the trees are fitted on {FIT_SPLIT!r}; choose valid or test"
        )
    scored = gbdt_features.read_examples(data_dir, manifest, split, task)
    fit = gbdt_features.read_examples(data_dir, manifest, FIT_SPLIT, task)
    options = PARAMETERS | {"seed": seed, "num_threads": num_threads}
    if STOP_SPLIT in split.split("+"):
        part, stop = _cut_by_time(fit, task)
        names, final = (f"the earlier part of {FIT_SPLIT!r}", f"the latest part of {FIT_SPLIT!r}"), fit
    else:
        part, stop = fit, gbdt_features.read_examples(data_dir, manifest, STOP_SPLIT, task)
        names = (f"split {FIT_SPLIT!r}", f"split {STOP_SPLIT!r}")
        final = gbdt_features.concatenated([fit, stop]) if refit else fit
    for examples, name in zip((part, stop), names):
        _check_classes(examples, name, task)
    booster = _boost(part, options, MAX_TREES, stop=stop)
    log.info("task %s: %d trees for split %s", task, booster.num_trees(), split)
    if final is not part:
        booster = _boost(final, options, booster.num_trees())
    features_NF, _ = gbdt_features.matrix(scored, counted=final)
    logit_N = booster.predict(features_NF, raw_score=True, num_threads=num_threads)
    return rows.predictions("logit", np.asarray(logit_N), scored.rows(), is_weighted)


def _cut_by_time(examples: Examples, task: str) -> tuple[Examples, Examples]:
    """Splits into the earlier and the latest part; requests of one second stay together."""
    is_tail_N = examples.time_s_N >= np.quantile(examples.time_s_N, 1 - TAIL_SHARE, method="higher")
    if is_tail_N.all():
        raise ValueError(
            f"task {task!r}: all requests of {FIT_SPLIT!r} are of one time, so it has no latest part to count "
            f"the trees on and {STOP_SPLIT!r} cannot be scored; score another split"
        )
    return examples.select(~is_tail_N), examples.select(is_tail_N)


def _check_classes(examples: Examples, name: str, task: str) -> None:
    counts_N = examples.sampling.counts()
    counted_N = examples.label_N if counts_N is None else examples.label_N[counts_N > 0]
    num_positives, num_rows = int(counted_N.sum()), len(counted_N)
    if not 0 < num_positives < num_rows:
        raise ValueError(
            f"task {task!r}: {name} has {num_positives} positives of {num_rows} rows that count; "
            "trees need both classes there"
        )


def _boost(fit: Examples, options: dict, num_trees: int, stop: Examples | None = None):
    """Fits a lightgbm.Booster; with `stop` it keeps the trees up to the least log loss on those rows."""
    try:
        import lightgbm  # imported here, because only this baseline should take the second that loading it costs
    except OSError as error:
        raise ValueError(f"LightGBM cannot be loaded ({error}); it needs OpenMP: apt-get install libgomp1") from error
    features_NF, names = gbdt_features.matrix(fit, counted=fit)
    categories = [index for index, name in enumerate(names) if name in fit.categories]
    weight_N = fit.sampling.fit_weights()
    data = lightgbm.Dataset(features_NF, fit.label_N, weight=weight_N, categorical_feature=categories)
    if stop is None:
        return lightgbm.train(options, data, num_trees)
    stop_NF, _ = gbdt_features.matrix(stop, counted=fit)
    return lightgbm.train(
        options,
        data,
        num_trees,
        valid_sets=[data.create_valid(stop_NF, stop.label_N, weight=stop.sampling.fit_weights())],
        callbacks=[lightgbm.early_stopping(PATIENCE_TREES, verbose=False)],
    )
