"""Calls functions through what may stand around them: a model through DDP, padded batches through a CUDA graph."""

import typing

import torch
from torch import nn


class Replaceable(nn.Module):
    """Can be called with a function in the place of its forward, so that DDP has begun when that runs."""

    def __call__(self, *values: typing.Any, instead: typing.Any = None, **options: typing.Any) -> typing.Any:
        """Calls `forward`, or `instead` with this module before all values."""
        if instead is None:
            return super().__call__(*values, **options)
        return instead(self, *values, **options)


def call(function: typing.Callable[..., torch.Tensor], *values: typing.Any) -> torch.Tensor:
    """Calls a function. `cuda_graphs` compiles this, and the function with it."""
    return function(*values)
