"""The N-rank test helper itself: results in order, errors with their rank, and no way to hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import distributed


def _sum_of_ranks(rank, world_size, offset):
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, int(total), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def _one_fails(rank, world_size):
    if rank == 1:
        raise KeyError("planted")
    dist.barrier()


def _one_leaves(rank, world_size):
    if rank == 0:
        time.sleep(3600)  # the peers wait in a collective that never comes
    dist.barrier()


def test_results_come_back_in_rank_order(tmp_path):
    assert distributed.run_distributed(_sum_of_ranks, 2, tmp_path, 10) == [(0, 21, 1, "1"), (1, 21, 1, "1")]


def test_error_names_rank_and_shows_traceback(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*_one_fails.*KeyError: 'planted'"):
        distributed.run_distributed(_one_fails, 2, tmp_path)


def test_deadlock_is_a_failure_with_stacks(tmp_path):
    with pytest.raises(TimeoutError, match=r"(?s)\[0, 1\] still ran.*_one_leaves"):
        distributed.run_distributed(_one_leaves, 2, tmp_path, timeout_s=4.0)
