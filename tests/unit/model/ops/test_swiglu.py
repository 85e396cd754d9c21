"""The feed-forward layer with its own backward against the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.model.ops import swiglu as swiglu_module
from gpsd_dist.model.ops.swiglu import swiglu


def make(dtype, width=8, hidden=12, tokens=21):
    torch.manual_seed(0)
    norm = nn.RMSNorm(width, eps=1e-5, dtype=dtype)
    gate_up, down = (nn.Linear(*shape, bias=False, dtype=dtype) for shape in ((width, 2 * hidden), (hidden, width)))
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(gate_up.weight)
    return torch.randn(tokens, width, dtype=dtype).requires_grad_(), norm, gate_up, down


def plain(x, norm, gate_up, down):
    gate, up = gate_up(norm(x)).chunk(2, dim=-1)
    return down(F.silu(gate) * up)


def value_and_gradients(function, x, norm, gate_up, down):
    out = function(x, norm, gate_up, down)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, [x, norm.weight, gate_up.weight, down.weight], upstream)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_plain_formula_forward_and_backward(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(swiglu_module, "_BLOCK_VALUES", 5 * 12)  # 4 blocks of 5 tokens and one of 1
    layer = make(dtype)
    for ours, theirs in zip(*(value_and_gradients(f, *layer) for f in (swiglu, plain)), strict=True):
        largest = theirs.detach().abs().max().item()
        assert largest > 0.1, "this does not test anything"
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)


def test_gradients_equal_finite_differences():
    x, norm, gate_up, down = make(torch.float64, tokens=3)
    weights = [norm.weight, gate_up.weight, down.weight]
    assert torch.autograd.gradcheck(lambda *_: swiglu(x, norm, gate_up, down), [x, *weights])


def test_extreme_gates_stay_finite():
    x, norm, gate_up, down = make(torch.float32)
    with torch.no_grad():
        gate_up.weight.mul_(1e4)
    for value in value_and_gradients(swiglu, x, norm, gate_up, down):
        assert value.isfinite().all()


@pytest.mark.parametrize("block_values", [1, 7 * 32, 1 << 17])
def test_block_size_does_not_change_a_bit(block_values, monkeypatch):
    layer = make(torch.float32, width=16, hidden=32, tokens=50)
    wanted = value_and_gradients(swiglu, *layer)
    monkeypatch.setattr(swiglu_module, "_BLOCK_VALUES", block_values)
    assert all(torch.equal(a, b) for a, b in zip(value_and_gradients(swiglu, *layer), wanted, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 3e-6)])
def test_scores_without_a_backward_are_those_with_one(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(swiglu_module, "_SCORED_TOKENS", 7)  # 7 blocks of 7 tokens and one of 1
    layer = make(dtype, width=16, hidden=32, tokens=50)
    wanted = swiglu(*layer).detach()
    with torch.no_grad():
        scored = swiglu(*layer)
    torch.testing.assert_close(scored, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def test_autocast_takes_the_plain_formula_and_no_token_is_no_problem():
    x, norm, gate_up, down = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert swiglu(x, norm, gate_up, down).dtype == torch.bfloat16
    assert swiglu(x[:0], norm, gate_up, down).shape == (0, 8)
