"""Keeps torch.compile out of functions whose sizes differ from batch to batch."""

import collections.abc
import os
import typing

import torch

_P = typing.ParamSpec("_P")
_T = typing.TypeVar("_T")


def uncompiled(function: collections.abc.Callable[_P, _T]) -> collections.abc.Callable[_P, _T]:
    """Makes a function, and what it calls, run eagerly: Dynamo would recompile for each batch until it gives up.

    `torch.compiler.disable` imports Dynamo: 145 MiB and 1.2 CPU-s. A program that says TORCHDYNAMO_DISABLE=1 before its
    imports compiles nothing, so it does without.
    """
    return function if os.environ.get("TORCHDYNAMO_DISABLE") == "1" else torch.compiler.disable(function)
