"""`ModelConfig.compile`: a tower, traced by dynamo and run by its eager backend, computes what it computes alone.

The traced program takes other branches (plain norms), so sums of at most 30 terms differ in order: float64 and
TOLERANCE are far below any error of a mask, a position or a branch.
"""

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.registry import TOWERS, Times
from tests.helpers.reference import fill_

TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}
WIDTH, FIELDS = 8, 3
BATCHES = [  # lengths, numbers of candidates: other shapes, other buckets, users without history
    ([0, 1, 3, 3, 8, 13], [2, 1, 3, 2, 1, 2]),
    ([2, 2, 9, 10], [1, 1, 1, 1]),
]


def make_batch(tower, lengths, counts, seed):
    random = torch.Generator().manual_seed(seed)
    fields = (FIELDS, WIDTH) if tower.reads_fields else (WIDTH,)
    x = torch.randn(sum(lengths) + sum(counts), *fields, dtype=torch.float64, generator=random)
    times = Times(torch.arange(sum(lengths)) * 3600, torch.full((len(lengths),), 10**6))
    return x.requires_grad_(), Packing.from_lengths(np.array(lengths), np.array(counts)), times


def run(tower, x, packing, times, seed):
    """[states of candidates, gradients of the input and of every weight]"""
    out = tower(x, packing, candidates_only=True, times=times)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))
    leaves = [x, *tower.parameters()]
    return [out, *torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "num_batches"),
    [(name, 1 if name in ("dien", "dmin", "wukong") else 2) for name in sorted(TOWERS)],  # tracing takes seconds each
)
def test_compiled_tower_equals_the_plain_one(name, num_batches):
    num_fields = FIELDS if TOWERS[name].reads_fields else 1
    config = ModelConfig(name, layers=1, width=WIDTH, heads=2)
    plain, compiled = (fill_(TOWERS[name](config, num_fields).double()) for _ in range(2))
    traced = []

    def backend(graph, inputs):
        traced.append(sum(node.op in ("call_function", "call_method") for node in graph.graph.nodes))
        return graph.forward

    try:
        compiled.compile(dynamic=True, backend=backend)
        for seed, (lengths, counts) in enumerate(BATCHES[:num_batches]):
            batch = make_batch(plain, lengths, counts, seed)
            for mine, expected in zip(run(compiled, *batch, seed), run(plain, *batch, seed)):
                torch.testing.assert_close(mine, expected, **TOLERANCE)
        assert sum(traced) > 0, "nothing was compiled"
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(TOWERS))
def test_batches_with_other_buckets_are_not_compiled_anew(name):
    """Dynamo compiles a function 8 times at most, then runs it as it is, for good, with a warning."""
    num_fields = FIELDS if TOWERS[name].reads_fields else 1
    tower = TOWERS[name](ModelConfig(name, layers=1, width=WIDTH, heads=2), num_fields).double()
    random = np.random.default_rng(0)
    graphs = []  # number of the batch that each was made for

    def backend(graph, inputs):
        graphs.append(seed)
        return graph.forward

    try:
        tower.compile(dynamic=True, backend=backend)
        for seed in range(10):
            lengths = np.sort(random.integers(1, 60 if seed % 2 else 9, random.integers(3, 20)))
            counts = random.integers(1, 4, len(lengths))
            x, packing, times = make_batch(tower, lengths.tolist(), counts.tolist(), seed)
            tower(x, packing, candidates_only=True, times=times).sum().backward()
        assert graphs, "nothing was compiled"
        assert max(graphs) < 4, graphs
    finally:
        torch._dynamo.reset()


def test_the_time_buckets_of_hstus_kernels_are_not_traced():
    """Their number is read in numpy, so that Dynamo would compile anew for every batch."""
    pytest.importorskip("triton")
    from gpsd_dist.model.ops import hstu_triton

    assert hstu_triton.pair_buckets._torchdynamo_disable
