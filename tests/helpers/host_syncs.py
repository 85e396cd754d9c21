"""Finds operations that would make the host wait for a GPU, on a machine without one."""

import contextlib
import threading
import traceback
import unittest.mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_VALUES = {"_local_scalar_dense", "equal", "is_nonzero"}  # a Python number or bool from a tensor
_SHAPES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "nonzero_numpy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


_TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item}
_FROM_HOST = {torch.Tensor.new_tensor}


class HostSyncs(TorchDispatchMode):
    """While entered, `found` collects one line per such operation of this thread (forward and CPU backward).

    Also calls that copy Python or numpy values into a tensor: to a GPU such a copy waits, as the values are not pinned.
    What TorchRec does is left out: it needs the number of rows that each rank sends on the host, and its CPU kernels
    are others than those on CUDA. Copies between devices are not seen: for those `torch.cuda.set_sync_debug_mode`.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._thread = threading.get_ident()
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._stack.enter_context(_Functions(self._note))
        for name in ("tensor", "as_tensor", "from_numpy"):
            plain = getattr(torch, name)
            self._stack.enter_context(unittest.mock.patch.object(torch, name, self._noted(plain, name)))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if self._waits(name, args, kwargs or {}):
            self._note(name)
        return func(*args, **(kwargs or {}))

    def _noted(self, function, name):
        def call(*args, **kwargs):
            self._note(name)
            return function(*args, **kwargs)

        return call

    def _note(self, name: str) -> None:
        stack = [f for f in traceback.extract_stack() if "/gpsd_dist/" in f.filename or "/torchrec/" in f.filename]
        if self._thread == threading.get_ident() and not (stack and "/torchrec/" in stack[-1].filename):
            where = " <- ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(stack[-3:]))
            self.found.append(f"{name} at {where or 'autograd'}")

    @staticmethod
    def _waits(name: str, args: tuple, kwargs: dict) -> bool:
        if name in _VALUES or name in _SHAPES:
            return True
        if name in _INDEXING:  # a mask is turned into positions, as many as it has ones
            return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return name == "repeat_interleave" and (args[2:] or [kwargs.get("output_size")])[0] is None


class _Functions(TorchFunctionMode):
    def __init__(self, note):
        super().__init__()
        self._note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _TO_HOST or func in _FROM_HOST:
            self._note(func.__name__)
        return func(*args, **(kwargs or {}))
