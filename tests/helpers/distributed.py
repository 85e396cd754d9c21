"""Run a function on N gloo ranks of this machine, as a test. Not a launcher: no restarts, no GPUs."""

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pathlib
import pickle
import tempfile
import time
import traceback
import typing

import torch
import torch.distributed as dist

_GRACE_S = 5.0  # after one rank failed, its peers have this long to fail by themselves
_START_S = 100.0  # for all ranks to begin: imports alone take 5 s, and much longer on a busy machine
RANK_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Ranks are forked from a server that has nothing but imports behind it: a rank of its own needs 4 s of CPU time for
# these. The one thread that they start, jemalloc's in pyarrow, is made for forks.
IMPORTED_ONCE = ["torch", "torchrec", "gpsd_dist.trainer"]


def run_distributed(
    func: typing.Callable, world_size: int, tmp_path: pathlib.Path, *args, timeout_s: float = 60.0
) -> list[typing.Any]:
    """Calls `func(rank, world_size, *args)` in `world_size` new processes of one gloo group, one thread each.

    `func` must be importable (module level), `args` and its result must pickle. Returns the results in rank order. The
    first rank that raised is re-raised as RuntimeError with its rank and traceback; whoever runs longer than
    `timeout_s`, counted from when all have begun, is killed and reported as TimeoutError with the stack of every stuck
    rank. Ranks meet through a file in `tmp_path`, not through a port.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ranks_", dir=tmp_path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    with with_environment(RANK_ENV):
        call = (dict(os.environ), func, world_size, folder, timeout_s, args)
        ranks = [context.Process(target=_run_rank, args=(rank, *call), daemon=True) for rank in range(world_size)]
        for process in ranks:
            process.start()
    try:
        _wait(ranks, folder, timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(rank: int, environment: dict[str, str], func, world_size: int, folder, timeout_s: float, args) -> None:
    """Body of one rank: leaves `result_<rank>` or `error_<rank>` in `folder`, and its stacks before it is killed."""
    os.environ.clear()  # the server's may be that of an earlier test
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(folder / f"stack_{rank}", "w") as stacks:
        faulthandler.dump_traceback_later(max(timeout_s - 1.0, 0.1), file=stacks)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder / 'store'}",
                rank=rank,
                world_size=world_size,
                # The parent, not gloo, decides when it is too long.
                timeout=datetime.timedelta(seconds=2 * timeout_s + _START_S),
            )
            result = pickle.dumps(func(rank, world_size, *args))
            _write(folder / f"result_{rank}", result)
        except BaseException:
            _write(folder / f"error_{rank}", traceback.format_exc().encode())
            os._exit(1)  # no destroy_process_group: peers may sit in a collective
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def _wait(ranks: list, folder: pathlib.Path, timeout_s: float) -> None:
    """Returns when all ranks ended well; raises for the first that did not."""
    deadline = time.monotonic() + _START_S
    all_began = failed = False
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if not all_began and len(list(folder.glob("stack_*"))) == len(ranks):
            all_began, deadline = True, time.monotonic() + timeout_s
        if not failed and any(process.exitcode not in (None, 0) for process in ranks):
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.02)
    errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RuntimeError(f"rank {errors[0].name.removeprefix('error_')} failed:\n{errors[0].read_text()}")
    dead = [(rank, process.exitcode) for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
    if dead:
        raise RuntimeError(f"ranks ended without a Python error, (rank, exit code): {dead}")
    stuck = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    if stuck:
        files = {rank: folder / f"stack_{rank}" for rank in stuck}
        stacks = "\n".join(f"rank {r}:\n{f.read_text() if f.exists() else 'not started'}" for r, f in files.items())
        raise TimeoutError(f"ranks {stuck} still ran after {timeout_s} s\n{stacks}")


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes by rename, so that the parent never reads half of it."""
    aside = path.with_name(f"part_{path.name}")
    aside.write_bytes(content)
    aside.replace(path)


@contextlib.contextmanager
def with_environment(values: dict[str, str]) -> typing.Iterator[None]:
    """Environment variables for the processes started inside the block; the old values come back after it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
