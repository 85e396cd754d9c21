"""Builds the loaders of a run: shuffled batches to train on, and a split in file order to score."""

import pathlib
import typing

import numpy as np

from gpsd_dist.batch.batch import Batch
from gpsd_dist.batch.transfer import pinned
from gpsd_dist.config import RunConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.decoded_cache import base_folder
from gpsd_dist.data.loader import Loader
from gpsd_dist.data.negatives import Mixed, uniform
from gpsd_dist.data.split_batches import pretrain_counts
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.schema import Manifest


def _disk_cache(run: RunConfig) -> tuple[pathlib.Path, int] | None:
    """Says where decoded row groups go that do not fit into memory, and how many bytes they may take there."""
    max_bytes = round(run.data.cache_gib * 2**30)
    return (base_folder(pathlib.Path(run.data_dir), run.data.cache_dir), max_bytes) if max_bytes else None


def _for_device(collate: Collate, runtime: Runtime) -> typing.Callable[..., tuple[Batch, ...]]:
    """Makes batches page-locked where they go to a GPU, in the loader's threads."""
    return (lambda rows, key: pinned(collate(rows, key))) if runtime.device.type == "cuda" else collate


def training_loader(
    run: RunConfig, manifest: Manifest, lookup_names: tuple[str, ...], runtime: Runtime, *, with_candidates: bool
) -> Loader[tuple[Batch, ...]]:
    """Loads shuffled batches of the training split; each comes in as many parts as gradients are accumulated over.

    Without candidates a batch has negatives for its next items instead. ValueError for an option or a file.
    """
    collate = Collate(
        manifest,
        lookup_names,
        run.data.max_history_length,
        with_candidates=with_candidates,
        negatives_per=None if with_candidates else run.pretrain.negatives_per,
        num_negative_groups=run.pretrain.num_negative_groups,
        num_negatives=run.pretrain.num_negatives,
        seed=run.seed,
        unknown_rate=run.data.unknown_rate,
        num_parts=run.train.micro_batches,
        token_multiple=run.execution.token_multiple,
        sampler=uniform if with_candidates or not run.pretrain.log_q else _mixed(run, manifest),
        with_target_times=not with_candidates and bool(run.pretrain.recent_days),
    )

    return Loader(
        run.data_dir,
        manifest,
        run.training_split,
        make_batch=_for_device(collate, runtime),
        columns=collate.columns(),
        rank=runtime.rank,
        world_size=runtime.world_size,
        num_data_shards=run.data.num_data_shards,
        global_batch_rows=run.data.global_batch_rows or None,
        global_batch_tokens=run.data.global_batch_tokens or None,
        max_history_length=run.data.max_history_length,
        seed=run.seed,
        num_threads=run.data.num_threads,
        prefetch=run.data.prefetch,
        disk_cache=_disk_cache(run),
    )


def _mixed(run: RunConfig, manifest: Manifest) -> Mixed:
    """Counts the events of items, in one pass over the split, where negatives are drawn by them."""
    item, share = manifest.feature(manifest.item_feature), run.pretrain.popular_share
    num_rows = manifest.table(item.table).num_rows
    return Mixed(share, pretrain_counts(run.data_dir, manifest, item) if share else np.zeros(num_rows, np.int64))


def evaluation_loader(
    run: RunConfig, manifest: Manifest, lookup_names: tuple[str, ...], split: str, runtime: Runtime
) -> Loader[tuple[Batch, ...]]:
    """Loads a split in file order, every row once; ranks that run out get empty batches.

    ValueError for a data set without labels.
    """
    if not manifest.tasks:
        raise ValueError(f"{run.data_dir} has no task, so there is nothing to score in {split!r}")
    collate = Collate(manifest, lookup_names, run.data.max_history_length, with_candidates=True)
    return Loader(
        run.data_dir,
        manifest,
        split,
        make_batch=_for_device(collate, runtime),
        columns=collate.columns(),
        rank=runtime.rank,
        world_size=runtime.world_size,
        num_data_shards=runtime.world_size,
        global_batch_rows=run.data.eval_batch_rows_per_rank * runtime.world_size,
        shuffle=False,
        num_threads=run.data.num_threads,
        prefetch=run.data.prefetch,
        disk_cache=_disk_cache(run),
    )
