"""Measures scores on the candidates that were seen often enough before, of models and baselines on the same rows.

In k-core data every item has k events or more. If fewer of them are in the pretraining histories, the others are
somebody's targets: its low count alone says that such a candidate is a positive. Among candidates with at least k
pretraining events the count gives nothing away.
"""

import collections.abc
import os
import pathlib

from gpsd_dist import schema
from gpsd_dist.data.split_batches import pretrain_counts
from gpsd_dist.metrics.classification import Predictions


def frequent_item_metrics(
    predictions: collections.abc.Mapping[str, Predictions], data_dir: str | os.PathLike, min_count: int
) -> dict[str, dict[str, float | int]]:
    """Computes per task `auc_item_count@K` and `rows_item_count@K`: K events in the `pretrain` histories or more.

    An unknown item has no count of its own, so it is left out. ValueError if the data set has no `pretrain` split, or
    item ids without a vocabulary, whose rows several items may share.
    """
    manifest = schema.read_manifest(pathlib.Path(data_dir))
    item = manifest.feature(manifest.item_feature)
    if item.table in manifest.unbounded:
        kind = manifest.unbounded[item.table]
        raise ValueError(f"--min_item_count counts items of a vocabulary, but those of {data_dir} have {kind} ids")
    names = [split.name for split in manifest.splits]
    if "pretrain" not in names:
        raise ValueError(f"--min_item_count counts events of split 'pretrain', but {data_dir} has only {names}")
    count_V = pretrain_counts(data_dir, manifest, item)
    count_V[: schema.NUM_RESERVED_ROWS] = 0
    found = {}
    for task, rows in predictions.items():
        metrics = rows.select(count_V[rows.items()] >= min_count).metrics()
        found[task] = {f"{name}_item_count@{min_count}": metrics[name] for name in ("auc", "rows")}
    return found
