"""A row-sharded item table on two ranks gives the ranks and sums of the whole table."""

import torch
import torch.distributed as dist

from gpsd_dist.metrics import ranking
from tests.helpers import distributed


def _problem():
    generator = torch.Generator().manual_seed(0)
    query_BD, item_VD = torch.randn(31, 16, generator=generator), torch.randn(203, 16, generator=generator)
    item_VD[50:60] = item_VD[120:130]  # ties across the shards
    target_B = torch.randint(0, 203, (31,), generator=generator)
    target_B[:5] = torch.arange(50, 55)
    excluded = ranking.Excluded(torch.randint(0, 203, (90,), generator=generator), torch.arange(90) % 31)
    return query_BD, item_VD, target_B, excluded


def _all_reduced(tensor):
    dist.all_reduce(tensor)
    return tensor


def _sharded(rank, world_size):
    query_BD, item_VD, target_B, excluded = _problem()
    low, high = ((0, 80), (80, 203))[rank]
    rank_B = ranking.rank_targets(
        query_BD,
        item_VD[low:high],
        target_B,
        first_row=low,
        num_items=203,
        excluded=excluded,
        sum_over_blocks=_all_reduced,
    )
    share = slice(0, 11) if rank == 0 else slice(11, 31)  # each rank counts its own queries
    sums = ranking.RankingSums()
    sums.update(rank_B[share], target_B[share])
    sums.reduce()
    return rank_B.tolist(), sums.metrics()


def test_sharded_table_ranks_like_the_whole_one(tmp_path):
    query_BD, item_VD, target_B, excluded = _problem()
    expected = ranking.rank_targets(query_BD, item_VD, target_B, excluded=excluded)
    sums = ranking.RankingSums()
    sums.update(expected, target_B)
    for ranks, metrics in distributed.run_distributed(_sharded, 2, tmp_path):
        assert ranks == expected.tolist()
        for name, value in sums.metrics().items():
            assert abs(metrics[name] - value) < 1e-15, name  # two partial sums instead of one
