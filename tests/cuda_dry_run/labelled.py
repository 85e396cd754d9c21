"""Tensors that say they are on CUDA and are computed on the CPU: numbers are real, and devices are checked.

Fake tensors have no numbers, so code that asks for some (a validation, managed ids) cannot run on them. Here it can,
with the results of a CPU. As on CUDA, operands on different devices are an error, and so is a view by numpy. Waits are
counted, not forbidden. There is no autograd.
"""

import contextlib
import typing

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA = torch.device("cuda", 0)
_MAY_MIX = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
_WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "repeat_interleave")


class Labelled(torch.Tensor):
    """Wraps a CPU tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        assert type(inner) is torch.Tensor, type(inner)
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        labelled = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=CUDA, **options)
        labelled.inner = inner.detach()
        return labelled

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {}, {})

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self, **_) -> str:
        return f"Labelled({self.inner})"


class OnCuda(TorchDispatchMode):
    """Makes tensors that are asked for on CUDA Labelled; `waits` counts by operation what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {}, self.waits)


def _computed(func, args, kwargs, waits: dict[str, int]) -> typing.Any:
    name = func._overloadpacket.__name__
    flat, shape = tree_flatten((args, kwargs))
    labelled = [value for value in flat if isinstance(value, Labelled)]
    on_host = [v for v in flat if isinstance(v, torch.Tensor) and not isinstance(v, Labelled) and v.dim()]
    if labelled and on_host and name not in _MAY_MIX:
        raise RuntimeError(f"{func}: operands on cuda:0 and on the CPU, {[tuple(v.shape) for v in on_host]}")
    device = kwargs.get("device", CUDA if labelled else None)
    if name in ("copy_", "index_put_", "_index_put_impl_") and not isinstance(args[0], Labelled):
        device = None
    is_cuda = device is not None and torch.device(device).type == "cuda"
    if (name in _WAITS and labelled) or (name in _MAY_MIX and labelled and (on_host or not is_cuda)):
        waits[name] = waits.get(name, 0) + 1
    own = {id(value.inner): value for value in labelled}
    inner = [value.inner if isinstance(value, Labelled) else value for value in flat]
    inner = [torch.device("cpu") if isinstance(v, torch.device) and v.type == "cuda" else v for v in inner]
    call_args, call_kwargs = tree_unflatten(inner, shape)
    out = func(*call_args, **call_kwargs)

    def label(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, Labelled) or not is_cuda:
            return value
        return own.get(id(value)) if id(value) in own else Labelled(value)

    return tree_map(label, out)


def labelled(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy that says it is on CUDA."""
    return Labelled(tensor.detach().clone())


def move(module: torch.nn.Module) -> None:
    """Moves the parameters of a module, without gradients, and its buffers."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(labelled(parameter), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else labelled(buffer)


@contextlib.contextmanager
def on_cuda() -> typing.Iterator[OnCuda]:
    """Runs the block without gradients, where `device="cuda"` means Labelled."""
    # `torch.tensor(..., device="cuda")` then makes its tensor on the CPU, and moves it where the mode sees it.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with torch.no_grad(), OnCuda() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
