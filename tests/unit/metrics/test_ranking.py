"""Full ranking: ties, exclusion, reserved rows, the rank cut, and independence of blocks and chunks."""

import functools
import itertools
import math

import pytest
import torch

from gpsd_dist.metrics import ranking


def _problem(num_queries=23, num_items=101, dim=5, seed=0):
    """Integer-valued vectors: scores are exact and many tie. Targets include both reserved rows."""
    generator = torch.Generator().manual_seed(seed)
    query_BD = torch.randint(-2, 3, (num_queries, dim), generator=generator).float()
    item_VD = torch.randint(-2, 3, (num_items, dim), generator=generator).float()
    target_B = torch.randint(0, num_items, (num_queries,), generator=generator)
    target_B[:2] = torch.tensor([0, 1])
    lengths_B = torch.randint(0, 9, (num_queries,), generator=generator)
    offsets_B1 = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
    item_N = torch.randint(0, num_items, (int(lengths_B.sum()),), generator=generator)
    item_N[offsets_B1[:-1][lengths_B > 0]] = target_B[lengths_B > 0]  # the target occurs in the history
    return query_BD, item_VD, target_B, item_N, offsets_B1


def _slow_ranks(query_BD, item_VD, target_B, item_N, offsets_B1):
    """The definition, one query and one item at a time."""
    ranks = []
    for b, target in enumerate(target_B.tolist()):
        seen = set(item_N[offsets_B1[b] : offsets_B1[b + 1]].tolist())
        others = [v for v in range(2, len(item_VD)) if v != target and v not in seen]
        own = float(query_BD[b] @ item_VD[target]) if target >= 2 else -math.inf
        ranks.append(1 + sum(float(query_BD[b] @ item_VD[v]) >= own for v in others))
    return ranks


def test_ranks_follow_the_definition():
    query_BD, item_VD, target_B, item_N, offsets_B1 = _problem()
    excluded = ranking.Excluded.from_offsets(item_N, offsets_B1)
    rank_B = ranking.rank_targets(query_BD, item_VD, target_B, excluded=excluded)
    assert rank_B.tolist() == _slow_ranks(query_BD, item_VD, target_B, item_N, offsets_B1)


def test_rows_that_are_no_item_do_not_compete(monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK_SCORES", 23 * 7)  # chunks of 7 rows
    query_BD, item_VD, target_B, item_N, offsets_B1 = _problem()
    exists_V = torch.rand(len(item_VD), generator=torch.Generator().manual_seed(2)) < 0.5
    exists_V[target_B] = True
    absent = (~exists_V).nonzero().squeeze(1)  # the same as excluding them for every query
    item_M = torch.cat([item_N, absent.repeat(len(target_B))])
    everyone = torch.arange(len(target_B))
    query_M = torch.cat([everyone.repeat_interleave(n) for n in (offsets_B1.diff(), len(absent))])
    expected = ranking.rank_targets(query_BD, item_VD, target_B, excluded=ranking.Excluded(item_M, query_M))
    excluded = ranking.Excluded.from_offsets(item_N, offsets_B1)
    rank_B = ranking.rank_targets(query_BD, item_VD, target_B, excluded=excluded, exists_R=exists_V)
    assert torch.equal(rank_B, expected)
    assert (rank_B < ranking.rank_targets(query_BD, item_VD, target_B, excluded=excluded)).any()


@pytest.mark.parametrize("bounds", [(0, 1, 50, 101), (0, 2, 2, 101), (0, 101, 101, 101)])
def test_row_blocks_give_the_ranks_of_the_whole_table(bounds, monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK_SCORES", 23 * 7)  # chunks of 7 rows
    query_BD, item_VD, target_B, item_N, offsets_B1 = _problem()
    item_VD = item_VD + 0.1 * torch.randn(item_VD.shape, generator=torch.Generator().manual_seed(1))
    excluded = ranking.Excluded.from_offsets(item_N, offsets_B1)
    expected = ranking.rank_targets(query_BD, item_VD, target_B, excluded=excluded)
    blocks = [(item_VD[low:high], low) for low, high in itertools.pairwise(bounds)]
    score_B = sum(ranking.target_scores(query_BD, block, target_B, first_row=low) for block, low in blocks)
    count = functools.partial(ranking.count_better_and_equal, query_BD, excluded=excluded)
    counts_2B = sum(count(block, target_B, score_B, first_row=low) for block, low in blocks)
    assert torch.equal(1 + counts_2B.sum(0), expected)


def test_equal_scores_rank_last_and_never_first():
    rank_B = ranking.rank_targets(torch.zeros(1, 4), torch.ones(12, 4), torch.tensor([5]))
    assert rank_B.tolist() == [10]  # ten items compete


def test_identical_items_tie_whatever_their_place():
    generator = torch.Generator().manual_seed(0)
    query_BD = torch.randn(300, 67, generator=generator)
    item_VD = torch.randn(1, 67, generator=generator).repeat(1003, 1)
    target_B = torch.randint(2, 1003, (300,), generator=generator)
    score_B = ranking.target_scores(query_BD, item_VD, target_B)
    counts_2B = ranking.count_better_and_equal(query_BD, item_VD, target_B, score_B)
    assert counts_2B[0].eq(0).all() and counts_2B[1].eq(1000).all()


def test_nan_scores_never_flatter():
    item_VD = torch.ones(6, 2)
    item_VD[3] = float("nan")
    query_BD = torch.tensor([[1.0, 1.0]])
    item_VD[5] = 2.0
    assert ranking.rank_targets(query_BD, item_VD, torch.tensor([5])).tolist() == [2]
    assert ranking.rank_targets(query_BD, item_VD, torch.tensor([3])).tolist() == [4]


def test_rank_cut_turns_not_found_into_one_beyond():
    item_VD = torch.arange(3000.0)[:, None]
    rank_B = ranking.rank_targets(
        torch.ones(2, 1), item_VD, torch.tensor([2999 - 2499, 2999 - 2500]), rank_cut=ranking.RANK_CUT
    )
    assert rank_B.tolist() == [2500, 2501]


def test_target_outside_the_table_raises():
    with pytest.raises(ValueError, match=r"targets lie in \[7, 7\], the table has rows \[0, 7\)"):
        ranking.rank_targets(torch.ones(1, 2), torch.ones(7, 2), torch.tensor([7]))


def test_no_queries_give_no_ranks():
    rank_B = ranking.rank_targets(torch.ones(0, 2), torch.ones(7, 2), torch.zeros(0, dtype=torch.int64))
    assert rank_B.shape == (0,)


def test_sums_follow_the_definitions_of_hr_ndcg_and_mrr():
    ranks = [1, 2, 10, 11, 1000, 2501]
    sums = ranking.RankingSums()
    sums.update(torch.tensor(ranks[:4]), torch.tensor([5, 6, 7, 8]))
    sums.update(torch.tensor(ranks[4:]), torch.tensor([1, 9]))
    sums.reduce()  # no process group: stays as it is
    result = sums.metrics()
    for cut in ranking.HR_CUTS:
        assert result[f"hr@{cut}"] == pytest.approx(sum(r <= cut for r in ranks) / 6, rel=1e-15)
    for cut in ranking.NDCG_CUTS:
        expected = sum(1 / math.log2(r + 1) for r in ranks if r <= cut) / 6
        assert result[f"ndcg@{cut}"] == pytest.approx(expected, rel=1e-14)
    assert result["mrr"] == pytest.approx(sum(1 / r for r in ranks) / 6, rel=1e-14)
    assert (result["rows"], result["unknown_targets"]) == (6, 1)


def test_no_rows_give_nan():
    result = ranking.RankingSums().metrics()
    assert math.isnan(result["mrr"]) and math.isnan(result["hr@10"]) and result["rows"] == 0
