"""Measures attention kernels on one GPU against the length buckets. Imports neither TorchRec nor FBGEMM."""

import statistics
import typing

import numpy as np
import torch

from benchmarks.gpu_bench import Bench
from gpsd_dist.batch.packing import Packing
from gpsd_dist.batch.transfer import to_device
from gpsd_dist.model.ops import attention, hstu_attention, hstu_bias


def attention_kernels(bench: Bench, name: str) -> dict[str, typing.Any]:
    """Times forward and backward of one layer's attention, H = 4, K = 64, by candidates per request."""
    found = {}
    for candidates in bench.sizes.candidates:
        packing, qkv = _requests(bench, candidates, 4, 64)
        sides = {"two_part": attention.two_part, "bucketed": attention.bucketed}
        found |= _compared(bench, sides, qkv, packing, f"k{candidates}")
    return found


def hstu_kernel(bench: Bench, name: str) -> dict[str, typing.Any]:
    """Times HSTU's attention with the time bias. On CPU both sides are the buckets."""
    packing, qkv = _requests(bench, 1, 4, 64)
    positions = bench.sizes.longest_history + 11
    random = torch.Generator().manual_seed(1)
    weights = (torch.randn(n, generator=random) * 0.02 for n in (2 * positions - 1, hstu_bias.NUM_TIME_BUCKETS))
    bias = hstu_bias.BiasWeights(*(weight.to(bench.device) for weight in weights))
    times = torch.arange(packing.num_history_tokens, device=bench.device) * 60
    request = torch.full((packing.num_requests,), 10**9, device=bench.device)

    def attend(qkv_S3HK, for_kernel):
        relations = hstu_attention.relate(packing, times, request, for_kernel)
        if for_kernel:
            return hstu_attention.attend(qkv_S3HK, bias, relations)
        return torch.cat(hstu_attention.bucketed(qkv_S3HK, bias, relations, False))

    has_kernel = hstu_attention.has_kernel(qkv)
    sides = {"kernel": lambda x, _: attend(x, has_kernel)[: packing.num_history_tokens]}
    sides["bucketed"] = lambda x, _: attend(x, False)[: packing.num_history_tokens]
    return _compared(bench, sides, qkv, packing, "history")


def _requests(bench: Bench, candidates: int, heads: int, width: int) -> tuple[Packing, torch.Tensor]:
    """Makes histories of 1 to `longest_history` tokens, all with as many candidates; bf16 on a GPU."""
    sizes, random = bench.sizes, np.random.default_rng(0)
    lengths = np.sort(random.integers(1, sizes.longest_history + 1, sizes.requests))
    host = Packing.from_lengths(lengths, np.full(sizes.requests, candidates))
    tokens = host.num_history_tokens + host.num_candidates
    qkv = torch.randn(tokens, 3, heads, width, generator=torch.Generator().manual_seed(0))
    dtype = torch.bfloat16 if bench.is_cuda else torch.float32
    return to_device(host, bench.device), qkv.to(bench.device, dtype).requires_grad_()


def _compared(bench: Bench, sides: dict, qkv: torch.Tensor, packing: Packing, key: str) -> dict[str, typing.Any]:
    """Measures milliseconds of every side, and how far the first is from the second one in float32, relative to its
    norm.
    """
    found, gradients = {}, {}
    for side, function in sides.items():

        def work(function=function):
            return torch.autograd.grad(function(qkv, packing).float().square().sum(), qkv)[0]

        seconds = bench.seconds(work, bench.sizes.repeats)
        found[f"{key}_{side}_ms"] = 1000 * statistics.median(seconds)
        gradients[side] = work().float()
    first, last = sides
    wide = qkv.detach().float().requires_grad_()
    out = sides[last](wide, packing)
    expected = torch.autograd.grad(out.square().sum(), wide)[0]
    found[f"{key}_{first}_error"] = float((gradients[first] - expected).norm() / expected.norm())
    found[f"{key}_{last}_error"] = float((gradients[last] - expected).norm() / expected.norm())
    return found
