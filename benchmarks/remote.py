"""Runs each side in a process of its own, driven by a pipe: they take turns, so that both see the same machine."""

import contextlib
import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import os
import resource
import time
import traceback
import typing
import unittest.mock

import torch

from benchmarks.product import Product
from benchmarks.sides import Side, SideSpec, opened
from benchmarks.step_split import Split
from gpsd_dist.distributed import huge_pages


@dataclasses.dataclass(frozen=True)
class Block:
    """Holds the times of steps of one side without a break."""

    num_steps: int
    num_tokens: int
    cpu_s: float
    wall_s: float

    @property
    def tokens_per_cpu_s(self) -> float:
        """Computes tokens per second of CPU time."""
        return self.num_tokens / self.cpu_s

    @property
    def step_cpu_ms(self) -> float:
        """Computes CPU time per step."""
        return 1000 * self.cpu_s / self.num_steps


@dataclasses.dataclass(frozen=True)
class Facts:
    """Holds what a side reports after some steps."""

    peak_mib: float
    step_split_ms: Split  # empty but for products
    table_bytes: float  # rows read, their gradients and their updates, per step; empty products only
    tables_report: str


class Remote:
    """Drives a side in another process, which stays until it is closed."""

    def __init__(self, spec: SideSpec):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        # As the launchers start the product. The C library reads its variable only while a process starts.
        has_huge_pages = spec.variant.startswith("product") and "huge pages" not in spec.variant
        with unittest.mock.patch.dict(os.environ, huge_pages.environment() if has_huge_pages else {}):
            self.process.start()
        theirs.close()
        self._receive()  # built

    def block(self, num_steps: int) -> Block:
        """Trains; the process does nothing between calls."""
        return typing.cast(Block, self._ask("block", num_steps))

    def facts(self, num_steps: int) -> Facts:
        """Trains `num_steps` more with its phases timed."""
        return typing.cast(Facts, self._ask("facts", num_steps))

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(("close", 0))
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()

    def _ask(self, name: str, value: int) -> typing.Any:
        self._pipe.send((name, value))
        return self._receive()

    def _receive(self) -> typing.Any:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"a side ended with exit code {self.process.exitcode}; is there memory left?") from error
        if isinstance(answer, str):
            raise RuntimeError(f"a side failed:\n{answer}")
        return answer


def _serve(pipe: multiprocessing.connection.Connection, spec: SideSpec) -> None:
    """Runs in the other process."""
    torch.set_num_threads(1)
    try:
        with opened(spec) as side:
            pipe.send(("built",))
            while True:
                name, value = pipe.recv()
                if name == "close":
                    return
                pipe.send(_timed(side, value) if name == "block" else _facts(side, value))
    except Exception:
        pipe.send(traceback.format_exc())


def _timed(side: Side, num_steps: int) -> Block:
    gc.collect()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    num_tokens = side.run_steps(num_steps)
    return Block(num_steps, num_tokens, time.process_time() - cpu_s, time.perf_counter() - wall_s)


def _facts(side: Side, num_steps: int) -> Facts:
    split, table_bytes, report = {}, 0.0, ""
    if isinstance(side, Product):
        split = side.split_step(num_steps)
        table_bytes, report = side.table_bytes_per_step(), side.trainer.components.tables.plan
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return Facts(peak_mib, split, table_bytes, report)


@contextlib.contextmanager
def running(specs: dict[str, SideSpec]) -> typing.Iterator[dict[str, Remote]]:
    """Builds all sides, one after the other; ends them together."""
    sides: dict[str, Remote] = {}
    try:
        for name, spec in specs.items():
            sides[name] = Remote(spec)
        yield sides
    finally:
        for side in sides.values():
            side.close()


def interleave(
    sides: dict[str, Remote], seconds: float, *, shortest_s: float = 2.0, rounds: tuple[int, int] = (3, 9)
) -> dict[str, list[Block]]:
    """Warms every side up, then lets them take turns until `seconds` of CPU time are about used up.

    Blocks of one round are neighbours in time: compare those.
    """
    step_s = {}
    for name, side in sides.items():
        side.block(1)
        step_s[name] = side.block(1).cpu_s
    round_s = sum(max(step, shortest_s) for step in step_s.values())
    counts = {name: max(1, round(shortest_s / step)) for name, step in step_s.items()}
    blocks: dict[str, list[Block]] = {name: [] for name in sides}
    for _ in range(min(max(round(seconds / round_s), rounds[0]), rounds[1])):
        for name, side in sides.items():
            blocks[name].append(side.block(counts[name]))
    return blocks
