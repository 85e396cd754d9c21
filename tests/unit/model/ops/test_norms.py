import pytest
import torch
from torch import nn

from gpsd_dist.model.ops.norms import normed, normed_linear


@pytest.mark.parametrize("num_tokens", [40, 20], ids=["folded", "fewer_tokens_than_outputs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_folded_gain_gives_the_norm_and_the_layer_one_after_the_other(dtype, num_tokens):
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 16, dtype=dtype)
    x[3] = 0  # only eps keeps it finite
    norm, linear = nn.RMSNorm(16, eps=1e-5, dtype=dtype), nn.Linear(16, 24, bias=False, dtype=dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    leaves = [x.requires_grad_(), norm.weight, linear.weight]
    for ours, theirs, used in (
        (normed_linear(x, norm, linear), linear(norm(x)), leaves),
        (normed(x, norm), norm(x), leaves[:2]),
    ):
        torch.testing.assert_close(ours, theirs, **tolerance)
        upstream = torch.randn_like(ours)
        got, wanted = (torch.autograd.grad(out, used, upstream, retain_graph=True) for out in (ours, theirs))
        for mine, expected in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, expected, **tolerance)
