"""Sets up one process: process group, device, seeds, log format. No other module reads torchrun's variables."""

import atexit
import contextlib
import dataclasses
import datetime
import gc
import logging
import os
import socket
import typing
import warnings

import numpy as np
import torch
import torch.distributed as dist

from gpsd_dist.distributed import parent_watch
from gpsd_dist.distributed.allocator import keep_freed_memory
from gpsd_dist.distributed.console import ConsoleHandler
from gpsd_dist.distributed.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Holds rank, world size and device of this process."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    ranks_per_machine: int = 0  # 0 means that all ranks are on this machine
    watchdog: Watchdog = dataclasses.field(default_factory=Watchdog, compare=False)

    @property
    def local_world_size(self) -> int:
        """Number of ranks on this machine."""
        return self.ranks_per_machine or self.world_size

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes logs, configs and markers."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(timeout_s: int) -> typing.Iterator[Runtime]:
    """Joins the group that torchrun describes, or a group of one outside torchrun. Collective.

    LauncherGone if the launcher dies before all ranks have joined; ValueError if there are too few GPUs. After an error
    inside the block a group of several is not destroyed, since that is a collective, which could hang; the launcher
    sees the exit and stops the other ranks. A group of one is: a notebook makes another one after a mistake.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = _device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    launcher_pid = parent_watch.launcher_pid()
    with parent_watch.leaving_with(launcher_pid):
        store = _store_of_one_machine(world_size, timeout)
        where = {} if store is None else {"store": store, "rank": rank, "world_size": world_size}
        # The device makes NCCL connect now, where an error is clear, and not in the first collective.
        device_id = device if device.type == "cuda" and "RANK" in os.environ else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id, **where)
    parent_watch.check(launcher_pid)
    _configure_logging(rank)
    watchdog = Watchdog(rank, launcher_pid)
    try:
        yield Runtime(rank, world_size, local_rank, device, int(os.environ.get("LOCAL_WORLD_SIZE", 0)), watchdog)
    except BaseException:
        if world_size == 1:
            _destroy_group()
        raise
    _destroy_group()


def _destroy_group() -> None:
    dist.destroy_process_group()
    # TorchRec holds the group in a cycle, and with it gloo's threads. One of them that lets go of the last collective
    # only while the interpreter ends would abort the process, after its work was done. Now it is waited for.
    atexit.register(gc.collect)


def _device(local_rank: int) -> torch.device:
    """Returns the GPU of this process, made the current one, or the CPU if there is no GPU.

    ValueError if this machine has more ranks than visible GPUs: NCCL cannot put two ranks on one.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    ranks, gpus = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1), torch.cuda.device_count()
    if ranks > gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ValueError(
            f"{ranks} ranks on this machine, {gpus} visible GPUs (CUDA_VISIBLE_DEVICES: {visible}): each rank takes "
            f"the one with its LOCAL_RANK; start {gpus} ranks (NPROC), or show every rank all of them (Slurm: "
            "--gpus-per-node, not --gpus-per-task)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # cuDNN's GRU would round float32 to 10 bits, which products do only where `TrainConfig.bf16` lets them.
    torch.backends.cudnn.allow_tf32 = False
    return device


def _store_of_one_machine(world_size: int, timeout: datetime.timedelta) -> dist.Store | None:
    """Returns where ranks meet that are all on this machine; None if torchrun has an address for them.

    Nothing of such a run listens beyond this machine: gloo and NCCL are told to use its loopback.
    """
    path = os.environ.get(parent_watch.STORE_VARIABLE)
    if path is None and "RANK" in os.environ:
        return None
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if path is None:
        return dist.HashStore()
    # A restart has a file of its own: ranks must not read addresses of dead ones.
    store = dist.FileStore(f"{path}{os.environ['TORCHELASTIC_RESTART_COUNT']}", world_size)
    store.set_timeout(timeout)
    return store


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step, so that random numbers (dropout) depend only on (seed, step, rank).

    A checkpoint then needs no generator state, and a resumed run draws the numbers of the uninterrupted one.
    """
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    # `torch.manual_seed` also seeds kinds of devices that are not there, and takes the Python stack for each.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def _configure_logging(rank: int) -> None:
    """Logs our own messages with the rank: rank 0 at INFO, the others at WARNING. Libraries keep their handlers."""
    logger = logging.getLogger("gpsd_dist")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    quiet_libraries()


def quiet_libraries() -> None:
    """Silences TorchRec and torch except for errors."""
    # These warnings are for TorchRec's own authors, and come in dozens of lines per process.
    for name in ("ShardedTensor", "HeuristicalStorageReservation"):
        warnings.filterwarnings("ignore", category=FutureWarning, message=f".*{name}.*")
    warnings.filterwarnings("ignore", category=UserWarning, message=".*not writable.*")
    for library in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
