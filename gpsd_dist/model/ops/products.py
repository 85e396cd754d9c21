"""Multiplies matrices with operands in bfloat16 on a CPU that has instructions for it (AVX512_BF16, AMX).

Only the operands are rounded (8 bits of mantissa). Sums inside a product are float32; its result is rounded once more
and goes on in float32, so that norms, residuals, attention, softmax and optimizer never see half precision.

Shape letters: S tokens, D width in, O width out.
"""

import functools

import torch
from torch import nn
from torch.autograd.function import once_differentiable

_LEAST_OUTPUTS = 16  # narrower layers are no faster, and the last layer of a head (one output) is the logit itself


def has_bf16_products() -> bool:
    """Says whether this CPU multiplies bfloat16 faster than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def use_bf16_products(model: nn.Module) -> None:
    """Lets the linear layers of a model round the operands of their products, but for very narrow ones. In place."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features >= _LEAST_OUTPUTS:
            # Methods of the instance are replaced. Modules of another class would be another model to checkpoints.
            module.forward = functools.partial(_linear_layer, module)  # type: ignore[method-assign]
            module.rounds_operands = True  # type: ignore[assignment]


def rounds_operands(linear: nn.Linear) -> bool:
    """Says whether `use_bf16_products` has reached a layer."""
    return getattr(linear, "rounds_operands", False)


def operand(x: torch.Tensor, is_rounded: bool) -> torch.Tensor:
    """Rounds one side of a product to bfloat16, or leaves it alone."""
    return x.bfloat16() if is_rounded else x


def linear(x_SD: torch.Tensor, weight_OD: torch.Tensor, is_rounded: bool) -> torch.Tensor:
    """Computes x weight^T: [..., D] -> [..., O], with rounded operands (in the backward, too) or without."""
    if not is_rounded:
        return nn.functional.linear(x_SD, weight_OD)
    return _Linear.apply(x_SD.flatten(0, -2), weight_OD).unflatten(0, x_SD.shape[:-1])


def _linear_layer(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    out = linear(x, layer.weight, True)
    return out if layer.bias is None else out + layer.bias


class _Linear(torch.autograd.Function):
    """Keeps the rounded operands for the backward: half the memory of float32."""

    @staticmethod
    def forward(ctx, x_SD, weight_OD):
        half_SD, half_OD = x_SD.bfloat16(), weight_OD.bfloat16()
        ctx.save_for_backward(half_SD, half_OD)
        return (half_SD @ half_OD.t()).to(x_SD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SO):
        (half_SD, half_OD), half_SO = ctx.saved_tensors, grad_SO.bfloat16()
        grad_SD = (half_SO @ half_OD).to(grad_SO.dtype) if ctx.needs_input_grad[0] else None
        return grad_SD, (half_SO.t() @ half_SD).to(grad_SO.dtype)
