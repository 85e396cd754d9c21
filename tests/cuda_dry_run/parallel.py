"""Stands for two ranks: a process group that exchanges nothing, and streams that wait for nothing.

FSDP2 runs as it is. DDP's bucket views and hooks run, too, but its all-reduce is replaced: the reducer in C++ wants a
result that the fake group does not give, and clocks that a CPU build does not have.
"""

import contextlib
import typing
import unittest.mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


class Stream:
    """Stands for streams and events. `syncs` counts the calls that make the host wait."""

    syncs = 0
    device = torch.device("cuda", 0)

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self) -> None:
        Stream.syncs += 1

    def record_event(self, *_) -> "Stream":
        return Stream()

    def wait_stream(self, *_) -> None:
        pass

    wait_event = record = wait_stream


class DDP(torch.nn.parallel.DistributedDataParallel):
    """Counts the steps in which rank 0 would send its buffers."""

    broadcasts = 0

    def __init__(self, model):
        super().__init__(model)
        self.logger = unittest.mock.Mock()
        self.register_comm_hook(None, _unchanged)

    def _sync_buffers(self) -> None:
        DDP.broadcasts += 1


def _unchanged(_, bucket) -> torch.futures.Future[torch.Tensor]:
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _real_mesh(*args):
    with unset_fake_temporarily():  # the mesh reads its own tensor of ranks
        return init_device_mesh(*args)


@contextlib.contextmanager
def two_ranks() -> typing.Iterator[None]:
    """Puts a fake group of two ranks in the place of the group of one."""
    nothing = lambda *_, **__: None  # noqa: E731
    patches = {
        "torch.nn.parallel.distributed._verify_param_shape_across_processes": nothing,
        "torch.nn.parallel.distributed._sync_module_states": nothing,
        "gpsd_dist.distributed.dense_parallel.DistributedDataParallel": DDP,
        "gpsd_dist.distributed.dense_parallel.init_device_mesh": _real_mesh,
        "torch.cuda.Stream": Stream,
        "torch.cuda.Event": Stream,
        "torch.cuda.stream": lambda _: contextlib.nullcontext(),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": nothing,
    }
    DDP.broadcasts = 0
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with contextlib.ExitStack() as stack:
            for name, value in patches.items():
                stack.enter_context(unittest.mock.patch(name, value))
            yield
    finally:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
