"""The Triton kernel of HSTU's attention against the length buckets, forward and backward.

Without a GPU it runs in Triton's interpreter, on CPU tensors: that checks masks, offsets, biases and gradients, not
what a compiler makes of them. float32 sums of at most 80 terms in another order: 1e-5; float16 has 11 bits of mantissa,
bfloat16 has 8.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.model.ops import hstu_attention, hstu_bias

ROOT = pathlib.Path(__file__).resolve().parents[2]
POSITIONS = 90
BATCHES = [  # lengths, numbers of candidates; blocks of keys and queries are 32 or 64 long
    ([0, 0, 3, 32, 33], [2, 1, 4, 1, 3]),
    ([1, 7, 70], [0, 0, 0]),
    ([0, 5, 80], [40, 0, 2]),
    ([0, 0], [1, 2]),
]


@pytest.fixture(scope="module")
def interpreted():
    """The kernel's module, made for the interpreter: Triton's own library is, too, so the choice is for the process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: it is in requirements-dev.txt")
    from gpsd_dist.model.ops import hstu_triton

    if not is_interpreted():
        pytest.skip("runs in the child process of test_the_kernels_in_the_interpreter")
    return hstu_triton


def test_the_kernels_in_the_interpreter():
    """Runs the tests that take `interpreted` where the interpreter was chosen before torch imported Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: it is in requirements-dev.txt")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is the child process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    done = subprocess.run(
        [*command, "-k", "not in_the_interpreter"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    # One combination of parameters has nothing to attend.
    assert "15 passed, 1 skipped" in done.stdout, done.stdout[-300:]


def is_interpreted() -> bool:
    from triton import language

    return type(language.zeros).__name__ == "InterpretedFunction"


def make_problem(lengths, counts, heads, width, dtype=torch.float32, device="cpu", seed=0):
    """(qkv, bias weights, relations for buckets, relations for the kernel)."""
    random = torch.Generator().manual_seed(seed)
    packing = Packing.from_lengths(np.array(lengths, np.int64), np.array(counts, np.int64))
    tokens = sum(lengths) + sum(counts)
    qkv = torch.randn(tokens, 3, heads, width, generator=random).to(dtype)
    position, time = (torch.randn(n, generator=random) for n in (2 * POSITIONS - 1, hstu_bias.NUM_TIME_BUCKETS))
    gaps = torch.randn(sum(lengths), generator=random).mul(3).exp().mul(1000).long()
    history_T = 10**9 + gaps.cumsum(0)
    history_T[1::5] = -1
    request_B = torch.full((len(lengths),), int(10**9 + gaps.sum()) + 50)
    request_B[-1] = -1
    related = [hstu_attention.relate(packing, history_T, request_B, for_kernel=flag) for flag in (False, True)]
    return qkv, hstu_bias.BiasWeights(position, time), *related


def run(attend, qkv, bias, relations, candidates_only):
    """Outputs and gradients of queries, keys, values and bias weights."""
    leaves = [part.detach().clone().requires_grad_() for part in (qkv, bias.position)]
    if bias.time is not None:
        leaves.append(bias.time.detach().clone().requires_grad_())
    outputs = attend(
        leaves[0], hstu_bias.BiasWeights(*leaves[1:], *[None] * (3 - len(leaves))), relations, candidates_only
    )
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=random).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return outputs, [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves)]


def check_agreement(module, problem, candidates_only, has_times, tolerance):
    qkv, bias, for_buckets, for_kernel = problem
    if not has_times:
        bias = hstu_bias.BiasWeights(bias.position, None)
        for_buckets = for_kernel = hstu_bias.Relations(for_kernel.packing, None, None)
    wanted, wanted_gradients = run(hstu_attention.bucketed, qkv.float(), bias, for_buckets, candidates_only)
    got, gradients = run(module.attend_to_histories, qkv, bias, for_kernel, candidates_only)
    assert len(got) == len(wanted)
    for ours, theirs in zip([*got, *gradients], [*wanted, *wanted_gradients]):
        scale = theirs.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(ours.float() / scale, theirs / scale, rtol=tolerance, atol=tolerance)
    return gradients


@pytest.mark.parametrize("candidates_only", [False, True])
@pytest.mark.parametrize(("lengths", "counts"), BATCHES, ids=str)
def test_the_kernel_agrees_with_the_buckets(interpreted, lengths, counts, candidates_only):
    if candidates_only and not sum(counts):
        pytest.skip("nothing to attend")
    problem = make_problem(lengths, counts, heads=2, width=5)
    gradients = check_agreement(interpreted, problem, candidates_only, True, 1e-5)
    assert not sum(lengths) or all(gradient.abs().max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize(("heads", "width"), [(1, 50), (2, 25), (3, 16)])
def test_any_head_width(interpreted, heads, width):
    """Rows are padded to 16, 32 and 64 channels inside the kernel."""
    check_agreement(interpreted, make_problem([3, 40], [2, 1], heads, width), False, True, 1e-5)


def test_without_a_time_bias(interpreted):
    check_agreement(interpreted, make_problem([3, 40], [2, 1], 2, 8), False, False, 1e-5)


def test_half_precision(interpreted):
    """float16: the interpreter multiplies the bits of bfloat16 numbers as integers (3.7.1)."""
    problem = make_problem([3, 70], [2, 1], 2, 16, torch.float16)
    check_agreement(interpreted, problem, False, True, 5e-3)


@pytest.mark.parametrize("last_first", [True, False])
def test_what_takes_longest_begins_first(interpreted, last_first):
    """Requests ascend by length. Programs start by number, the first axis running fastest."""
    from tests.helpers.hstu_places import note_places

    requests, heads, blocks = 3, 2, 2
    place_P3 = torch.full((requests * heads * blocks, 3), -1)
    note_places[(requests * heads, blocks)](place_P3, heads, last_first)
    in_order = [(r, h, b) for b in range(blocks) for r in reversed(range(requests)) for h in range(heads)]
    if last_first:
        in_order = [(r, h, blocks - 1 - b) for r, h, b in in_order]
    assert [tuple(place) for place in place_P3.tolist()] == in_order


def test_a_cpu_never_runs_the_kernel():
    assert not hstu_attention.has_kernel(torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.parametrize("has_times", [True, False])
@pytest.mark.parametrize("candidates_only", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_the_compiled_kernel_agrees_with_the_buckets(dtype, tolerance, candidates_only, has_times):
    """On the GPU, whose logarithm may put a pair at the edge of a time bucket into the next one: rare, seed 0 has none
    on a CPU."""
    from gpsd_dist.model.ops import hstu_triton

    if is_interpreted():
        pytest.skip("Triton was imported for its interpreter before: run the tests marked gpu by themselves")
    lengths, counts = [0, 3, 32, 33, 80], [2, 0, 4, 1, 40]
    qkv, bias, for_buckets, for_kernel = make_problem(lengths, counts, 2, 25, dtype)
    on_gpu = [part.cuda() for part in (qkv, bias.position, bias.time)]
    related = [to_cuda(part) for part in (for_buckets, for_kernel)]
    problem = on_gpu[0], hstu_bias.BiasWeights(*on_gpu[1:]), *related
    check_agreement(hstu_triton, problem, candidates_only, has_times, tolerance)


def to_cuda(value):
    """Every tensor inside dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(to_cuda(part) for part in value)
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: to_cuda(getattr(value, name)) for name in value.__dataclass_fields__})
    return value
