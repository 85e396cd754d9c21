"""Runs tower, head and losses of a padded batch as one function with few shapes, which `cuda_graphs` captures.

What is around it, and launched one by one: the tokens' embeddings, the context, and rows of targets and negatives.
Shape letters: S tokens and C candidates of the padded batch, M places of next-item positions in it, G sets of
negatives, N negatives per set, U distinct rows of the item table, K = M + G N rows of targets and negatives, D width,
E embedding width, X width of the context.
"""

import typing

import torch

from gpsd_dist.batch.batch import Batch, NextItem
from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.padding import PaddedTargets
from gpsd_dist.model.gpsd import NextItemModel, RankingModel
from gpsd_dist.schema import Feature

_NO_TARGET = -100  # of `losses.full_softmax`
Columns: typing.TypeAlias = dict[str, torch.Tensor]  # By name
Sums: typing.TypeAlias = typing.Callable[..., torch.Tensor]
"""`_sums` of a stage: what the model puts out, and what it is compared with -> float32 [L]."""


def ranking_sums(model: RankingModel, embeddings: Columns, batch: Batch, sums: Sums) -> torch.Tensor:
    """Sums the losses of a stage over candidates: `sums(logits, labels, sampling)`. Padding has no observed label."""
    padded = batch.padded
    assert padded is not None
    x_SD = padded.fill(model.backbone.tokens(embeddings, batch))
    context_CX = padded.fill_candidates(model.context(embeddings, batch), 0.0) if model.context.width else None
    labels = {task: padded.fill_candidates(label_C, torch.nan) for task, label_C in batch.labels.items()}
    sampling = {name: padded.fill_candidates(value_C, 1.0) for name, value_C in batch.sampling.items()}
    return model.backbone.call_padded(_rank, sums, model, x_SD, padded.packing, context_CX, labels, sampling)


def _rank(
    sums: Sums,
    model: RankingModel,
    x_SD: torch.Tensor,
    packing: Packing,
    context_CX: torch.Tensor | None,
    labels: Columns,
    sampling: Columns,
) -> torch.Tensor:
    x_C = model.backbone.tower(x_SD, packing, True)
    return sums(model.heads(x_C if context_CX is None else torch.cat((x_C, context_CX), dim=-1)), labels, sampling)


def fits(batch: Batch) -> bool:
    """Says whether next items have places of their own in a padded batch, and draws no offsets."""
    wanted, padded = batch.next_item, batch.padded
    return wanted is not None and padded is not None and padded.targets is not None and wanted.negative_log_q_GN is None


def next_item_sums(model: NextItemModel, embeddings: Columns, batch: Batch, item: Feature, sums: Sums) -> torch.Tensor:
    """Sums the losses of a stage over next items: `sums(outputs, rows [K, E], next items)`. Padding has no target."""
    padded = batch.padded
    assert padded is not None and padded.targets is not None and batch.next_item is not None and item.table is not None
    x_SD = padded.fill(model.backbone.tokens(embeddings, batch))
    # How many distinct rows there are differs from batch to batch, so they are gathered here.
    next_item, row_K = _at_places(batch.next_item, padded.targets, item.name, tuple(model.auxiliary_table))
    rows_KE = embeddings[item.table].index_select(0, row_K)
    return model.backbone.call_padded(_predict, sums, model, x_SD, padded.packing, rows_KE, next_item)


def _predict(
    sums: Sums, model: NextItemModel, x_SD: torch.Tensor, packing: Packing, rows_KE: torch.Tensor, next_item: NextItem
) -> torch.Tensor:
    return sums(model.outputs(model.backbone.tower(x_SD, packing)), rows_KE, next_item)


def _at_places(
    wanted: NextItem, targets: PaddedTargets, item: str, auxiliary: tuple[str, ...]
) -> tuple[NextItem, torch.Tensor]:
    """Spreads next items over the places of `targets`, and gives each target and negative a row of its own.

    Returns (next items, int64 [K]: which of the U rows of the item table those K rows are).
    """
    of_M, num_places = targets.source_M, len(targets.source_M)
    row_K = torch.cat((wanted.target[item].index_select(0, of_M), wanted.negative_row_GN.flatten()))
    place_K = torch.arange(len(row_K), device=row_K.device)
    target = {name: wanted.target[name].index_select(0, of_M) for name in auxiliary}
    target = {name: torch.where(targets.is_real_M, value_M, _NO_TARGET) for name, value_M in target.items()}
    return NextItem(
        token_M=targets.token_M,
        target=target | {item: place_K[:num_places]},
        item_M=wanted.item_M.index_select(0, of_M),
        group_offsets=targets.group_offsets,
        negative_item_GN=wanted.negative_item_GN,
        negative_row_GN=place_K[num_places:].view_as(wanted.negative_row_GN),
        is_real_M=targets.is_real_M,
    ), row_K
