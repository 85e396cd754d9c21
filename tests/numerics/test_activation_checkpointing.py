"""Recomputed activations: the same bits, also with dropout, for a fraction of the memory."""

import contextlib

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.distributed.dense_parallel import compile_tower, recompute_blocks
from gpsd_dist.model.registry import TOWERS, Times
from tests.helpers import reference

LENGTHS, COUNTS, WIDTH, LAYERS = [0, 3, 9, 40], [2, 1, 3, 2], 16, 6


@contextlib.contextmanager
def counted_bytes():
    """Bytes that autograd keeps for the backward of what runs inside, each storage once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # holds it, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())


def run(name, recomputed, dropout):
    tower = TOWERS[name](ModelConfig(name, layers=LAYERS, width=WIDTH, heads=2, dropout=dropout), 1)
    reference.fill_(tower)
    if recomputed:
        recompute_blocks(tower, has_dropout=dropout > 0)
    parameters = list(tower.parameters())
    packing = Packing.from_lengths(np.array(LENGTHS), np.array(COUNTS))
    times = Times(torch.arange(sum(LENGTHS)) * 60, torch.full((len(LENGTHS),), 10**6))
    x_SD = torch.randn(sum(LENGTHS) + sum(COUNTS), WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(3)
    with counted_bytes() as count:
        out = tower(x_SD, packing, candidates_only=True, times=times)
        kept = count()
    gradients = torch.autograd.grad(out.square().sum(), [x_SD, *parameters])
    after = torch.rand(())
    return [out, *gradients, after], kept, list(dict(tower.named_parameters()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["transformer", "sasrec", "hstu"])
def test_recomputed_blocks_give_the_same_bits_and_keep_less(name, dropout):
    plain, kept, names = run(name, False, dropout)
    recomputed, kept_less, same_names = run(name, True, dropout)
    assert names == same_names
    for mine, expected in zip(recomputed, plain, strict=True):
        assert torch.equal(mine, expected)
    assert kept_less < kept / 3, (kept_less, kept)


def test_recomputed_blocks_may_be_compiled(monkeypatch):
    """As a run with `ModelConfig.compile`, by dynamo's eager backend; the traced branches add up in another order."""
    compiler, calls = torch.compile, []

    def traced(function, **options):
        calls.append(options)
        return compiler(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    config = ModelConfig("transformer", layers=2, width=WIDTH, heads=2)
    plain, compiled = (TOWERS["transformer"](config, 1).double() for _ in range(2))
    for tower in (plain, compiled):
        reference.fill_(tower)
    compile_tower(compiled, by_block=True)
    recompute_blocks(compiled, has_dropout=False)
    packing = Packing.from_lengths(np.array([3, 9]), np.array([1, 2]))
    x_SD = torch.randn(15, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sides = []
    try:
        for tower in (compiled, plain):
            with counted_bytes() as count:
                out = tower(x_SD, packing, candidates_only=True)
                kept = count()
            gradients = torch.autograd.grad(out.square().sum(), [x_SD, *tower.parameters()])
            sides.append((kept, out, *gradients))
    finally:
        torch._dynamo.reset()
    (kept_less, *mine), (kept, *expected) = sides
    assert calls == [{"dynamic": True}] * 2 and kept_less < kept / 2
    for found, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
