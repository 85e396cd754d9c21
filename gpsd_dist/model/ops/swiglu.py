"""Computes a SwiGLU feed-forward layer behind an RMSNorm on CPU, with a backward of its own.

    hidden = silu(gate) * up;  d hidden / d gate = hidden + sigmoid(gate) (up - hidden);  d hidden / d up = silu(gate)

The forward stores both derivatives in the memory of gate and up, block by block, while a block is in the cache. The
backward then takes two products per hidden value and no exponential, and 3 F values per token are kept instead of 4 F.
On CUDA, in compiled code and in half precision the plain formula is used.

Shape letters: S tokens, D width, F hidden width, s tokens of a block.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from gpsd_dist.model.ops.norms import folded, normed_linear
from gpsd_dist.model.ops.products import operand, rounds_operands

_BLOCK_VALUES = 1 << 17  # s F: 2 MiB in float32, a second-level cache; twice or a quarter of it made no difference
_SCORED_TOKENS = 1024  # without a backward: 1.24x at width 64, 1.14x at 128, 1.05x at 256, and no slower at 1,024


def swiglu(x_SD: torch.Tensor, norm: nn.RMSNorm, gate_up: nn.Linear, down: nn.Linear) -> torch.Tensor:
    """Computes down(silu(gate) * up) with gate, up = gate_up(norm(x)), layers without bias: [S, D] -> [S, D]"""
    assert gate_up.bias is None and down.bias is None, (gate_up, down)
    is_wide = x_SD.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if x_SD.is_cuda or torch.compiler.is_compiling() or not is_wide:
        gate, up = normed_linear(x_SD, norm, gate_up).chunk(2, dim=-1)
        return down(F.silu(gate) * up)
    is_rounded = rounds_operands(gate_up) and rounds_operands(down)
    if not torch.is_grad_enabled() and not is_rounded:
        return _scored(*folded(x_SD, norm, gate_up), down.weight)
    return _SwiGLU.apply(*folded(x_SD, norm, gate_up), down.weight, is_rounded)


def _scored(unit_SD: torch.Tensor, gate_up_weight: torch.Tensor, down_weight: torch.Tensor) -> torch.Tensor:
    """Computes the layer without a backward: nothing is kept, so hidden values need not leave the cache."""
    out_SD = torch.empty_like(unit_SD)
    for unit_sD, out_sD in zip(unit_SD.split(_SCORED_TOKENS), out_SD.split(_SCORED_TOKENS), strict=True):
        gate_sF, up_sF = (unit_sD @ gate_up_weight.t()).chunk(2, dim=-1)
        torch.mm(F.silu(gate_sF).mul_(up_sF), down_weight.t(), out=out_sD)
    return out_SD


class _SwiGLU(torch.autograd.Function):
    """Works in blocks of tokens. The size of a block changes no bit, because only elementwise operations are split."""

    @staticmethod
    def forward(ctx, unit_SD, gate_up_weight, down_weight, is_rounded):
        wide, ctx.is_rounded = unit_SD.dtype, is_rounded
        unit_SD, gate_up_weight, down_weight = (
            operand(side, is_rounded) for side in (unit_SD, gate_up_weight, down_weight)
        )
        gate_up_S2F = (unit_SD @ gate_up_weight.t()).to(wide)
        hidden_SF = gate_up_S2F.new_empty(len(unit_SD), down_weight.shape[1])
        block = max(1, _BLOCK_VALUES // hidden_SF.shape[1])
        for gate_up_s2F, hidden_sF in zip(gate_up_S2F.split(block), hidden_SF.split(block), strict=True):
            gate_sF, up_sF = gate_up_s2F.chunk(2, dim=-1)
            sigmoid_sF = gate_sF.sigmoid()
            torch.mul(gate_sF.mul_(sigmoid_sF), up_sF, out=hidden_sF)
            torch.lerp(hidden_sF, up_sF, sigmoid_sF, out=up_sF)
        hidden_SF = operand(hidden_SF, is_rounded)
        ctx.save_for_backward(unit_SD, gate_up_weight, down_weight, gate_up_S2F, hidden_SF)
        return (hidden_SF @ down_weight.t()).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SD):
        unit_SD, gate_up_weight, down_weight, slopes_S2F, hidden_SF = ctx.saved_tensors
        up_slope_SF, gate_slope_SF = slopes_S2F.chunk(2, dim=-1)
        wide, grad_SD = grad_SD.dtype, operand(grad_SD, ctx.is_rounded)
        grad_SF, grad_S2F = grad_SD @ down_weight, torch.empty_like(slopes_S2F)
        grad_gate_SF, grad_up_SF = grad_S2F.chunk(2, dim=-1)
        torch.mul(grad_SF, gate_slope_SF, out=grad_gate_SF)
        torch.mul(grad_SF, up_slope_SF, out=grad_up_SF)
        # Transposed like this, the product takes a fifth to a third less time at widths 256 and 64 (MKL).
        grad_S2F = operand(grad_S2F, ctx.is_rounded)
        grad_gate_up_weight = (unit_SD.t() @ grad_S2F).t()
        grads = grad_S2F @ gate_up_weight, grad_gate_up_weight, grad_SD.t() @ hidden_SF
        return *(grad.to(wide) for grad in grads), None
