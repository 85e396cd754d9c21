"""Casts embeddings and their gradients to half precision for the all-to-all between ranks.

FBGEMM's own codec does not serve: it divides by the loss scale while still in fp16, so the small gradients that the
scale should save underflow all the same; and on gloo TorchRec silently replaces bf16 by fp16 (it only logs).
"""

import typing

import torch
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from gpsd_dist.config.execution import ExecutionConfig

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FP16_GRADIENT_SCALE = 1024.0  # gradients of a mean over 1e5 positions are near fp16's smallest number; untuned


class AllToAllCodec:
    """Implements TorchRec's QuantizedCommCodec. `scale` is a power of 2, so multiplying by it rounds nothing."""

    def __init__(self, dtype: torch.dtype, scale: float = 1.0):
        self.quantized_dtype = dtype
        self._scale = scale

    def encode(self, values: torch.Tensor, ctx: typing.Any = None) -> torch.Tensor:
        """Casts float32 to the dtype that is sent; values out of its range are clamped to the largest number."""
        if self.quantized_dtype == torch.float32:
            return values
        largest = torch.finfo(self.quantized_dtype).max
        return (values * self._scale).clamp(-largest, largest).to(self.quantized_dtype)

    def decode(self, received: torch.Tensor, ctx: typing.Any = None) -> torch.Tensor:
        """Casts what was received back to float32."""
        return received.float() / self._scale if received.dtype != torch.float32 else received

    def calc_quantized_size(self, input_len: int, ctx: typing.Any = None) -> int:
        """Returns `input_len`: the codec changes the dtype, not the number of values."""
        return input_len

    def create_context(self) -> None:
        """Returns None: the codec keeps no state (TorchRec calls this)."""


def all_to_all_codecs(execution: ExecutionConfig) -> dict[str, QuantizedCommCodecs] | None:
    """Builds the codecs that the sharder takes; None if embeddings and gradients are sent in float32."""
    if execution.exchange_forward == execution.exchange_backward == "fp32":
        return None
    scale = _FP16_GRADIENT_SCALE if execution.exchange_backward == "fp16" else 1.0
    forward = AllToAllCodec(_TYPES[execution.exchange_forward])
    backward = AllToAllCodec(_TYPES[execution.exchange_backward], scale)
    return {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: QuantizedCommCodecs(forward, backward)}
