"""Packs table rows and their gradients into half precision for the exchange between ranks.

Our own, because FBGEMM's codec divides by its scale while still in fp16, which loses the small gradients that the scale
is there to keep; and TorchRec turns bf16 on gloo into fp16 with no more than a log line.
"""

import typing

import torch
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from gpsd_dist.config.execution import ExecutionConfig

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FP16_GRADIENT_SCALE = 1024.0  # gradients of a mean over 1e5 positions are near fp16's smallest number; untuned


class ExchangeCodec:
    """What TorchRec calls a quantized comm codec. `scale` is a power of 2: it changes no bit but those out of range."""

    def __init__(self, dtype: torch.dtype, scale: float = 1.0):
        self.quantized_dtype = dtype
        self._scale = scale

    def encode(self, values: torch.Tensor, ctx: typing.Any = None) -> torch.Tensor:
        """float32 -> what travels; what is too large becomes the largest number."""
        if self.quantized_dtype == torch.float32:
            return values
        largest = torch.finfo(self.quantized_dtype).max
        return (values * self._scale).clamp(-largest, largest).to(self.quantized_dtype)

    def decode(self, received: torch.Tensor, ctx: typing.Any = None) -> torch.Tensor:
        """-> float32"""
        return received.float() / self._scale if received.dtype != torch.float32 else received

    def calc_quantized_size(self, input_len: int, ctx: typing.Any = None) -> int:
        """As many values as before."""
        return input_len

    def create_context(self) -> None:
        """There is none."""


def exchange_codecs(execution: ExecutionConfig) -> dict[str, QuantizedCommCodecs] | None:
    """For the sharder; None: rows and gradients travel as they are."""
    if execution.exchange_forward == execution.exchange_backward == "fp32":
        return None
    scale = _FP16_GRADIENT_SCALE if execution.exchange_backward == "fp16" else 1.0
    forward = ExchangeCodec(_TYPES[execution.exchange_forward])
    backward = ExchangeCodec(_TYPES[execution.exchange_backward], scale)
    return {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: QuantizedCommCodecs(forward, backward)}
