"""Computes full-ranking metrics of next-item prediction: HR@K, NDCG@K, MRR from exact ranks among all items.

No items are sampled: all compete except those that the caller excludes (the visible history). A table that is sharded
by rows is ranked block by block: the rank is one plus the number of better items, and counts add up over blocks.

Shape letters: B queries, D width, V items of the whole table, R rows of one block of it, N excluded
(query, item) pairs.
"""

import collections.abc
import dataclasses
import math

import torch
import torch.distributed as dist

from gpsd_dist import schema

HR_CUTS = (1, 10, 50, 100, 200, 500, 1000)
NDCG_CUTS = (1, 10, 50, 100, 200)
MEAN_KEYS = (*(f"hr@{cut}" for cut in HR_CUTS), *(f"ndcg@{cut}" for cut in NDCG_CUTS), "mrr")
RANK_CUT = 2500  # protocol of HSTU (arXiv:2402.17152): they score the top 2500, and a target outside counts as 2501st
CHUNK_SCORES = 1 << 23  # scores per chunk: 64 MiB of float64


@dataclasses.dataclass(frozen=True)
class Excluded:
    """Lists, packed, the items that do not compete for a query (its history). The target itself always competes."""

    item_N: torch.Tensor  # int64 [N] table rows; may contain repeats and reserved rows
    query_N: torch.Tensor  # int64 [N], the query each belongs to

    @staticmethod
    def from_offsets(item_N: torch.Tensor, offsets_B1: torch.Tensor) -> "Excluded":
        """Builds it from jagged form: query b excludes `item_N[offsets_B1[b] : offsets_B1[b + 1]]`; int64 [B + 1]."""
        lengths_B = offsets_B1.diff()
        return Excluded(item_N, torch.arange(len(lengths_B), device=item_N.device).repeat_interleave(lengths_B))


@dataclasses.dataclass(frozen=True)
class Offsets:
    """Adds to scores what no product of vectors gives, in float64: of targets, and of the rows of a block."""

    target_B: torch.Tensor  # float64 [B]
    of_rows: collections.abc.Callable[[int, int], torch.Tensor]
    """(first, stop) -> float64 [B, stop - first], of these rows of the table"""


def rank_targets(
    query_BD: torch.Tensor,
    item_RD: torch.Tensor,
    target_B: torch.Tensor,
    *,
    first_row: int = 0,
    num_items: int | None = None,
    excluded: Excluded | None = None,
    exists_R: torch.Tensor | None = None,
    rank_cut: int | None = None,
    sum_over_blocks: collections.abc.Callable[[torch.Tensor], torch.Tensor] | None = None,
    offsets: Offsets | None = None,
) -> torch.Tensor:
    """Ranks each target among all items by dot product, plus offsets if there are any: int64 [B], 1 is best.

    Ties count against the target (rank = 1 + better + equal items), so a model that gives all items one score ranks
    last, not first. A target in a reserved row (an item outside the vocabulary) ranks behind all items that compete.
    Scores are summed in float64 and rounded to float32, so that ranks do not depend on chunks, blocks or batch size,
    and equal items tie. For cosine similarity, normalise both sides first.

    Args:
        query_BD: float [B, D].
        item_RD: float [R, D], rows [first_row, first_row + R) of the table.
        target_B: int64 [B], table rows.
        first_row: table row of `item_RD[0]`; the rows below schema.NUM_RESERVED_ROWS never compete.
        num_items: V; by default this block is the end of the table.
        excluded: items that do not compete, per query.
        exists_R: bool [R], rows of the block that are an item; None: all but the reserved ones.
        rank_cut: ranks beyond it become `rank_cut + 1`.
        sum_over_blocks: sums a tensor over all blocks of a sharded table, e.g. an all-reduce; then this is a collective
            of all ranks with the same queries on each. Called twice. Default: this block is the whole table.
        offsets: added to scores before they are rounded.

    Raises ValueError if a target is outside [0, V).
    """
    num_items = first_row + len(item_RD) if num_items is None else num_items
    if len(target_B) and not 0 <= int(target_B.min()) <= int(target_B.max()) < num_items:
        raise ValueError(
            f"targets lie in [{int(target_B.min())}, {int(target_B.max())}], the table has rows [0, {num_items})"
        )
    sum_over_blocks = sum_over_blocks or (lambda tensor: tensor)
    target_score_B = sum_over_blocks(target_scores(query_BD, item_RD, target_B, first_row=first_row, offsets=offsets))
    counts_2B = count_better_and_equal(
        query_BD,
        item_RD,
        target_B,
        target_score_B,
        first_row=first_row,
        excluded=excluded,
        exists_R=exists_R,
        offsets=offsets,
    )
    rank_B = 1 + sum_over_blocks(counts_2B).sum(0)
    return rank_B if rank_cut is None else rank_B.clamp(max=rank_cut + 1)


def target_scores(
    query_BD: torch.Tensor,
    item_RD: torch.Tensor,
    target_B: torch.Tensor,
    *,
    first_row: int = 0,
    offsets: Offsets | None = None,
) -> torch.Tensor:
    """Scores each query's target, float32 [B]; 0 where its row is not in this block, so that blocks add up."""
    is_local_B = (target_B >= first_row) & (target_B < first_row + len(item_RD))
    score_B = torch.zeros(len(target_B), dtype=torch.float32, device=query_BD.device)
    if len(item_RD):
        row_B = (target_B - first_row).clamp(0, len(item_RD) - 1)
        product_B = (query_BD.double() * item_RD[row_B].double()).sum(1)
        score_B = (product_B if offsets is None else product_B + offsets.target_B).float()
    return torch.where(is_local_B, score_B, 0.0)


def count_better_and_equal(
    query_BD: torch.Tensor,
    item_RD: torch.Tensor,
    target_B: torch.Tensor,
    target_score_B: torch.Tensor,
    *,
    first_row: int = 0,
    excluded: Excluded | None = None,
    exists_R: torch.Tensor | None = None,
    offsets: Offsets | None = None,
) -> torch.Tensor:
    """Counts per query the items of this block that score above the target, and equal to it: int64 [2, B].

    The target, excluded items and reserved rows are not counted. A NaN score counts as better, so it never helps.
    """
    is_unknown_B = target_B < schema.NUM_RESERVED_ROWS
    target_score_B = target_score_B.masked_fill(is_unknown_B, -math.inf)
    query_BD = query_BD.double()
    counts_2B = torch.zeros(2, len(target_B), dtype=torch.int64, device=query_BD.device)
    start = max(schema.NUM_RESERVED_ROWS - first_row, 0)
    chunk_rows = max(CHUNK_SCORES // max(len(target_B), 1), 1)
    for low in range(start, len(item_RD), chunk_rows):
        high = min(low + chunk_rows, len(item_RD))
        product_BC = query_BD @ item_RD[low:high].double().T
        if offsets is not None:
            product_BC += offsets.of_rows(first_row + low, first_row + high)
        score_BC = product_BC.float()
        competes_BC = torch.ones_like(score_BC, dtype=torch.bool)
        if exists_R is not None:
            competes_BC &= exists_R[low:high]
        if excluded is not None:
            column_N = excluded.item_N - (first_row + low)
            is_here_N = (column_N >= 0) & (column_N < high - low)
            competes_BC[excluded.query_N[is_here_N], column_N[is_here_N]] = False
        column_B = target_B - (first_row + low)
        is_here_B = (column_B >= 0) & (column_B < high - low)
        competes_BC[is_here_B.nonzero().squeeze(1), column_B[is_here_B]] = False
        counts_2B[0] += ((score_BC <= target_score_B[:, None]).logical_not_() & competes_BC).sum(1)
        counts_2B[1] += ((score_BC == target_score_B[:, None]) & competes_BC).sum(1)
    return counts_2B


class RankingSums:
    """Accumulates HR@K, NDCG@K and MRR over batches as sums, which then add up over ranks."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._cuts_H = torch.tensor(HR_CUTS, device=device)
        self._cuts_G = torch.tensor(NDCG_CUTS, device=device)
        self._sums = torch.zeros(len(HR_CUTS) + len(NDCG_CUTS) + 3, dtype=torch.float64, device=device)

    def update(self, rank_B: torch.Tensor, target_B: torch.Tensor) -> None:
        """Adds B ranks (int64, 1 is best) of the items `target_B` (int64). No GPU sync."""
        rank_B1 = rank_B[:, None]
        gain_B1 = 1 / torch.log2(rank_B1.double() + 1)  # one relevant item: the ideal DCG is 1
        self._sums += torch.cat(
            [
                (rank_B1 <= self._cuts_H).double().sum(0),
                ((rank_B1 <= self._cuts_G) * gain_B1).sum(0),
                (1 / rank_B1.double()).sum(0),
                (target_B[:, None] < schema.NUM_RESERVED_ROWS).double().sum(0),
                torch.full((1,), float(len(rank_B)), dtype=torch.float64, device=rank_B.device),
            ]
        )

    def reduce(self) -> None:
        """Adds up the sums of all ranks; call it once. Collective; without a process group it does nothing."""
        if dist.is_initialized():
            dist.all_reduce(self._sums)

    def metrics(self) -> dict[str, float | int]:
        """Returns `hr@K`, `ndcg@K`, `mrr`, `rows` and `unknown_targets`; means are NaN without rows.

        `unknown_targets` counts targets in reserved rows, which rank last. A rank beyond a `rank_cut` adds
        1 / (cut + 1) to `mrr`.
        """
        *sums, unknown, rows = self._sums.tolist()
        means = {name: value / rows if rows else math.nan for name, value in zip(MEAN_KEYS, sums)}
        return means | {"rows": int(rows), "unknown_targets": int(unknown)}
