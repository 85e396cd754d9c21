"""Folds the gain of an RMSNorm into the weight of the linear layer behind it, on CPU.

    linear(x / rms(x) * gain) = (x / rms(x)) @ (weight * gain)^T

The gain is then multiplied into the weight [O, D] instead of into all tokens [S, D], forward and backward; if there are
fewer tokens than outputs (S < O), it is multiplied into the tokens. The division by the root mean square has its own
backward, which passes over the tokens four times; autograd through torch's norm on CPU, which is not fused, makes about
twelve passes. On CUDA torch has a fused kernel, and compilers fuse by themselves: both get the plain formula.

Shape letters: S tokens, D width in, O width out.
"""

import torch
from torch import nn

from gpsd_dist.model.ops import products


def normed_linear(x_SD: torch.Tensor, norm: nn.RMSNorm, linear: nn.Linear) -> torch.Tensor:
    """Computes linear(norm(x)) for a layer without bias: [S, D] -> [S, O]"""
    assert linear.bias is None and norm.eps is not None, (linear, norm)
    if x_SD.is_cuda or torch.compiler.is_compiling():
        return linear(norm(x_SD))
    return products.linear(*folded(x_SD, norm, linear), products.rounds_operands(linear))


def folded(x_SD: torch.Tensor, norm: nn.RMSNorm, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns an input [S, D] and a weight [O, D] whose product is linear(norm(x)).

    The gain is multiplied into the one with fewer rows.
    """
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
    """Computes x / sqrt(mean(x^2) + eps). Its backward needs the output and one number per token, but not the input."""

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
