import torch

from gpsd_dist.distributed.runtime import Runtime, seed_step


def _draw(seed: int, step: int, rank: int) -> float:
    seed_step(seed, step, rank)
    return float(torch.rand(()))


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    keys = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2**20) for rank in (0, 1)]
    first = [_draw(*key) for key in keys]
    torch.rand(7)
    assert [_draw(*key) for key in reversed(keys)][::-1] == first
    assert len(set(first)) == len(keys)


def test_only_rank_0_is_main():
    assert [Runtime(rank, 2, rank, torch.device("cpu")).is_main for rank in (0, 1)] == [True, False]
