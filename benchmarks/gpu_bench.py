"""Defines sizes, device and clock of the GPU suite. Imports neither TorchRec nor FBGEMM: some parts need neither."""

import dataclasses
import pathlib
import time
import typing

import torch

from gpsd_dist.distributed.runtime import Runtime

TRAINED = {"l24h1024a16": (24, 1024, 16), "l4h256a4": (4, 256, 4)}  # size -> (layers, width, heads)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sets how much is measured."""

    tokens_per_step: int = 72_000  # upper bound; 8192 requests with 492,000 tokens then make 7 batches of 70,000
    negatives: int = 4096
    steps: int = 30
    warmup_steps: int = 10
    table_rows: int = 2_000_000
    looked_up_rows: int = 500_000
    repeats: int = 20
    max_trained: tuple[int, int, int] | None = None  # trains this size (layers, width, heads) whatever the name says
    requests: int = 1024
    longest_history: int = 200
    candidates: tuple[int, ...] = (1, 10, 100)


SIZES = {"gpu": Sizes(), "toy": Sizes(300, 16, 2, 1, 200, 50, 2, (2, 16, 2), 6, 9, (1, 3))}
"""`toy` is for tests on a CPU."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Gives every part its sizes, device and clock."""

    sizes: Sizes
    runtime: Runtime
    folder: pathlib.Path

    @property
    def device(self) -> torch.device:
        """Returns the device of this process."""
        return self.runtime.device

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU to wait for."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Waits until the device has finished all its work."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, work: typing.Callable[[], typing.Any], repeats: int) -> list[float]:
        """Times each repetition of `work`, after one to warm up."""
        work()
        found = []
        for _ in range(repeats):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begin)
        return found
