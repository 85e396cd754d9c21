"""Folds the gain of an RMSNorm into the weight of the linear layer behind it, on CPU.

    linear(x / rms(x) * gain) = (x / rms(x)) @ (weight * gain)^T

The gain then costs one product with a weight instead of one with all tokens, forward and backward. With fewer tokens
than outputs of the layer, it stays with the tokens. The rest of the norm has a backward of its own that passes over the
tokens four times; autograd through torch's unfused CPU norm does about twelve times. CUDA has a fused kernel and
compilers fuse by themselves, so there the plain formula is used.

Shape letters: S tokens, D width in, O width out.
"""

import torch
import torch.nn.functional as F
from torch import nn


def normed_linear(x_SD: torch.Tensor, norm: nn.RMSNorm, linear: nn.Linear) -> torch.Tensor:
    """Computes linear(norm(x)) for a layer without bias: [S, D] -> [S, O]"""
    assert linear.bias is None and norm.eps is not None, (linear, norm)
    if x_SD.is_cuda or torch.compiler.is_compiling():
        return linear(norm(x_SD))
    return F.linear(*folded(x_SD, norm, linear))


def folded(x_SD: torch.Tensor, norm: nn.RMSNorm, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns input [S, D] and weight [O, D] whose product is linear(norm(x)); the shorter one has the gain."""
    unit_SD = _UnitRms.apply(x_SD, norm.eps)
    if len(x_SD) < linear.out_features:
        return unit_SD * norm.weight, linear.weight
    return unit_SD, linear.weight * norm.weight


def normed(x_SD: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    """Computes norm(x): [S, D] -> [S, D]"""
    assert norm.eps is not None, norm
    if x_SD.is_cuda or torch.compiler.is_compiling():
        return norm(x_SD)
    return _UnitRms.apply(x_SD, norm.eps) * norm.weight


class _UnitRms(torch.autograd.Function):
    """Computes x / sqrt(mean(x^2) + eps). For backward it keeps its output and a number per token, not its input."""

    @staticmethod
    def forward(ctx, x_SD, eps):
        norm_S1 = torch.linalg.vector_norm(x_SD, dim=-1, keepdim=True)
        scale_S1 = norm_S1.square_().mul_(1 / x_SD.shape[-1]).add_(eps).rsqrt_()
        unit_SD = x_SD * scale_S1
        ctx.save_for_backward(unit_SD, scale_S1)
        return unit_SD

    @staticmethod
    def backward(ctx, grad_SD):
        unit_SD, scale_S1 = ctx.saved_tensors
        along_S1 = (grad_SD * unit_SD).mean(-1, keepdim=True)
        return torch.addcmul(grad_SD, unit_SD, along_S1, value=-1).mul_(scale_S1), None
