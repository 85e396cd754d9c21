"""One pass over a split without training: ranking tasks, or next item against all items. Every row counts once."""

import itertools
import typing

import torch
import torch.nn.functional as F

from gpsd_dist.assembly import Assembly
from gpsd_dist.batch.batch import Batch, lookup_of
from gpsd_dist.config import RunConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.loader import Loader
from gpsd_dist.distributed.collectives import all_gather_rows, all_sum
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.classification import Predictions, gather_metrics
from gpsd_dist.metrics.ranking import Excluded, RankingSums, rank_targets
from gpsd_dist.preflight import check_can_be_scored
from gpsd_dist.schema import Manifest, Task
from gpsd_dist.stages.losses import conditional_label

Metrics = dict[str, dict[str, float | int]]
_LOOKUP_CHUNK_ROWS = 65_536


def evaluation_loader(run: RunConfig, manifest: Manifest, lookup_names: tuple[str, ...], split: str, runtime: Runtime):
    """Loader of a split in file order, every row once; ranks that run out get empty batches."""
    check_can_be_scored(run, manifest, split)
    collate = Collate(manifest, lookup_names, run.data.max_history_length, with_candidates=True)
    return Loader(
        run.data_dir,
        manifest,
        split,
        make_batch=collate,
        columns=collate.columns(),
        rank=runtime.rank,
        world_size=runtime.world_size,
        num_data_shards=runtime.world_size,
        global_batch_rows=run.data.eval_batch_rows_per_rank * runtime.world_size,
        shuffle=False,
        num_threads=run.data.num_threads,
        prefetch=run.data.prefetch,
    )


def evaluate_split(
    run: RunConfig,
    manifest: Manifest,
    assembly: Assembly,
    split: str,
    runtime: Runtime,
    rank_cut: int | None = None,
) -> Metrics:
    """Exact metrics over all rows and ranks; the same dict on every rank. Collective.

    Finetuned: task -> auc, gauc, log_loss, ne, calibration, rows. Pretrained: "next_item" -> hr@K, ndcg@K, mrr, rows;
    a target beyond `rank_cut` then has rank `rank_cut` + 1 (see metrics.ranking.RANK_CUT).
    """
    was_training = assembly.model.training
    assembly.model.eval()
    loader = evaluation_loader(run, manifest, assembly.lookup_names, split, runtime)
    with torch.no_grad(), torch.autocast(runtime.device.type, torch.bfloat16, enabled=run.train.bf16):
        if assembly.tasks:
            metrics = _score_candidates(assembly, loader, runtime)
        else:
            metrics = {"next_item": _rank_items(manifest, assembly, loader, runtime, rank_cut)}
    assembly.model.train(was_training)
    return metrics


def _score_candidates(assembly: Assembly, loader: typing.Iterable, runtime: Runtime) -> Metrics:
    predictions = {task.name: Predictions() for task in assembly.tasks}
    for (host_batch,) in loader:
        runtime.watchdog.alive()
        (batch,) = assembly.ids.assign((host_batch.to(runtime.device),))
        rows = assembly.tables(batch.lookup)  # collective: also with an empty batch
        if batch.num_requests or assembly.forward_is_collective:
            logits = assembly.model(rows, batch)
            add_predictions(predictions, assembly.tasks, logits, batch)
    return gather_metrics(predictions)


def add_predictions(
    predictions: dict[str, Predictions], tasks: tuple[Task, ...], logits: dict[str, torch.Tensor], batch: Batch
) -> None:
    """Adds a batch; a task given another one is scored where that label is 1."""
    user_C = batch.user_hash_B[batch.packing.request_C]
    for task in tasks:
        label_C = batch.labels[task.name]
        if task.given is not None:
            label_C = conditional_label(label_C, batch.labels[task.given])
        predictions[task.name].add(logits[task.name].detach(), label_C, user_C, ~label_C.isnan())


def _rank_items(
    manifest: Manifest, assembly: Assembly, loader: typing.Iterable, runtime: Runtime, rank_cut: int | None
) -> dict[str, float | int]:
    """The last history state of each request against every item that is not in its (visible) history.

    Targets are the positive candidates of the first task. Each rank scores its part of the items for the queries of
    all ranks.
    """
    item = manifest.feature(manifest.item_feature)
    num_rows = manifest.table(item.table).num_rows
    first, block_RE = _item_block(assembly, item.table, num_rows, runtime)
    occupied = assembly.ids.occupied(item.table, runtime.device)
    exists_R = None
    if occupied is not None:
        exists_R = torch.isin(first + torch.arange(len(block_RE), device=runtime.device), occupied)
    sums = RankingSums(runtime.device)
    for (host_batch,) in loader:
        runtime.watchdog.alive()
        (batch,) = assembly.ids.assign((host_batch.to(runtime.device),))
        rows = assembly.tables(batch.lookup)
        query_BE = _last_states(assembly, rows, batch, block_RE.shape[1])
        is_positive_C = batch.labels[manifest.tasks[0].name] == 1
        request_P = batch.packing.request_C[is_positive_C]
        target_P = batch.candidate_item_C[is_positive_C]
        excluded = _own_history(batch, request_P)
        queries = query_BE[request_P], target_P, excluded
        sums.update(
            _ranks_over_all(*queries, block_RE, exists_R, first, num_rows, runtime, rank_cut=rank_cut), target_P
        )
    sums.reduce()
    return sums.metrics()


def _last_states(assembly: Assembly, rows: dict[str, torch.Tensor], batch: Batch, width: int) -> torch.Tensor:
    """Unit state [B, E] at the last history token; zeros (ranks its target last) for an empty history."""
    query_BE = torch.zeros(batch.num_requests, width, device=batch.history_item_T.device)
    if len(batch.history_item_T) or assembly.forward_is_collective:
        offsets = batch.packing.history_offsets
        has_history = offsets.diff() > 0
        hidden_TE = F.normalize(assembly.model(rows, batch).hidden_TE, dim=-1)
        query_BE[has_history] = hidden_TE[offsets[1:][has_history] - 1]
    return query_BE


def _item_block(assembly: Assembly, table: str, num_rows: int, runtime: Runtime) -> tuple[int, torch.Tensor]:
    """(first row, unit rows [R, E]) of this rank's part of the item table, by lookup: right for any sharding."""
    cuts = [num_rows * rank // runtime.world_size for rank in range(runtime.world_size + 1)]
    largest = max(stop - start for start, stop in itertools.pairwise(cuts))
    first, stop = cuts[runtime.rank], cuts[runtime.rank + 1]
    parts = []
    for offset in range(0, largest, _LOOKUP_CHUNK_ROWS):  # the same number of lookups on every rank
        index = torch.arange(min(first + offset, stop), min(first + offset + _LOOKUP_CHUNK_ROWS, stop))
        sizes = [len(index) if name == table else 0 for name in assembly.lookup_names]
        lookup = lookup_of(assembly.lookup_names, index.to(runtime.device), sizes)
        parts.append(F.normalize(assembly.tables(lookup)[table].float(), dim=-1))
    return first, torch.cat(parts)


def _own_history(batch: Batch, request_P: torch.Tensor) -> Excluded:
    """The history of each positive's request; requests with several positives contribute once for each."""
    offsets = batch.packing.history_offsets
    length_P = offsets.diff()[request_P]
    query_N = torch.repeat_interleave(length_P)
    nth_N = torch.arange(len(query_N), device=query_N.device) - (length_P.cumsum(0) - length_P)[query_N]
    return Excluded(batch.history_item_T[offsets[request_P][query_N] + nth_N], query_N)


def _ranks_over_all(
    query_PE: torch.Tensor,
    target_P: torch.Tensor,
    excluded: Excluded,
    block_RE: torch.Tensor,
    exists_R: torch.Tensor | None,
    first: int,
    num_rows: int,
    runtime: Runtime,
    *,
    rank_cut: int | None,
) -> torch.Tensor:
    """Ranks [P] of this rank's targets: queries travel to every rank, counts of better items are summed back."""
    targets = all_gather_rows(target_P)
    start = sum(len(part) for part in targets[: runtime.rank])
    rank_A = rank_targets(
        torch.cat(all_gather_rows(query_PE)),
        block_RE,
        torch.cat(targets),
        first_row=first,
        num_items=num_rows,
        excluded=Excluded(
            torch.cat(all_gather_rows(excluded.item_N)), torch.cat(all_gather_rows(excluded.query_N + start))
        ),
        exists_R=exists_R,
        rank_cut=rank_cut,
        sum_over_blocks=all_sum,
    )
    return rank_A[start : start + len(target_P)]
